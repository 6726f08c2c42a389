"use strict";
// Shows what the report's data hold. Every control is a native one, so that a keyboard will do.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function picture(source, alt) {
  const shown = element("img", { src: source, alt });
  shown.addEventListener("load", () => shown.classList.toggle("small", shown.naturalWidth <= 96));
  return shown;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The colour of a curve; on a dark page nearer to white, so that all of them stand out.
function colourOf(number) {
  const colour = data.colours[number % data.colours.length];
  if (!isDark()) return colour;
  const parts = [1, 3, 5].map((i) => Math.round(parseInt(colour.slice(i, i + 2), 16) * 0.7 + 255 * 0.3));
  return `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}
const isDark = () => parseInt(css("--back").slice(1, 3), 16) < 128;

// Curves.

let shownCell = 0;
const hiddenArms = new Set();

// A run's steps and values of a metric; steps that are not its own are those of every metric.
function series(run, metric) {
  const [steps, values] = run.metrics[metric] || [[], []];
  const pairs = (steps || run.steps).map((step, i) => [step, values[i]]);
  return pairs.filter(([, value]) => value !== null);
}

// Running mean, its ends repeated, as scipy's uniform_filter1d has it in mode `nearest`.
function smooth(values, size) {
  const last = values.length - 1;
  return values.map((_, i) => {
    let sum = 0;
    for (let k = 0; k < size; k++) {
      sum += values[Math.min(last, Math.max(0, i - Math.floor(size / 2) + k))];
    }
    return sum / size;
  });
}

// Mean and standard error over the runs of a curve, step by step.
function overSeeds(curve, metric, size, base) {
  const isEveryStep = !/^(validation|probe)\//.test(metric);
  const byStep = new Map(base === undefined ? [] : [[0, [base]]]);
  for (const run of curve.runs) {
    const pairs = series(run, metric);
    let values = pairs.map(([, value]) => value);
    if (isEveryStep) values = smooth(values, size);
    pairs.forEach(([step], i) => byStep.set(step, [...(byStep.get(step) || []), values[i]]));
  }
  return [...byStep].sort((a, b) => a[0] - b[0]).map(([step, values]) => {
    const mean = values.reduce((a, b) => a + b) / values.length;
    const squares = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    const error = values.length > 1 ? Math.sqrt(squares / (values.length - 1) / values.length) : 0;
    return { step, mean, error };
  });
}

function lines(name, points, { color, dash = "solid", x = "step" }) {
  const xs = points.map((point) => point[x]);
  const traces = [{
    x: xs, y: points.map((point) => point.mean), name, mode: points.length > 1 ? "lines" : "markers",
    line: { color, dash, width: 2 }, marker: { color },
    hovertemplate: `%{y:.4g} at %{x:.4g}<extra>${escapeHtml(name)}</extra>`,
  }];
  if (byId("bands").checked && points.some((point) => point.error > 0)) {
    const edge = { x: xs, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    traces.push(
      { ...edge, y: points.map((point) => point.mean - point.error) },
      { ...edge, y: points.map((point) => point.mean + point.error), fill: "tonexty", fillcolor: color + "33" },
    );
  }
  return traces;
}

// Plotly reads some HTML in its texts.
const escapeHtml = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%/g, "&#37;");

function layout(cell, yTitle, xTitle) {
  const marks = byId("marks");
  const isMarked = marks && marks.checked && !cell.title;
  const logged = isMarked ? data.runs.flatMap((run) => run.images.logged) : [];
  const axis = { gridcolor: css("--line"), zeroline: false, automargin: true };
  return {
    margin: { l: 45, r: 10, t: 8, b: 38 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--text"), size: 12, family: "system-ui, sans-serif" },
    xaxis: { ...axis, title: { text: xTitle, standoff: 5 } },
    yaxis: { ...axis, title: { text: yTitle, standoff: 5, font: { size: 11 } } },
    showlegend: false, hovermode: "closest",
    shapes: xTitle !== "Step" ? [] : [...new Set(logged)].map((step) => ({
      type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: { color: css("--soft"), width: 1, dash: "dot" }, opacity: 0.5,
    })),
  };
}

const ANY = "Any metric";
const CONFIG = { responsive: true, displayModeBar: false, doubleClick: "reset" };

function tracesOf(cell, metrics) {
  const size = Number(byId("window").value);
  const alone = cell.curves.length === 1;
  const traces = [];
  cell.curves.forEach((curve, number) => {
    if (hiddenArms.has(curve.name)) return;
    metrics.forEach((metric, place) => {
      const points = overSeeds(curve, metric, size, cell.base[metric]);
      if (!points.length) return;
      const color = colourOf(alone ? place : number);
      const isReference = metric === "entropy/reference";
      const name = alone ? metric : curve.name + (isReference ? ", reference" : "");
      traces.push(...lines(name, points, { color, dash: isReference ? "dash" : "solid" }));
    });
  });
  return traces;
}

// What a chart shows in words, for those who do not see it.
function inWords(title, traces, xName) {
  const parts = traces.filter((trace) => trace.hoverinfo !== "skip").map((trace) => {
    const last = trace.y.length - 1;
    return `${trace.name} from ${trace.y[0].toPrecision(3)} to ${trace.y[last].toPrecision(3)} at ${xName} ${trace.x[last]}`;
  });
  return `${title}: ${parts.join("; ") || "nothing is shown"}`;
}

function draw(plot, title, cell, traces, yTitle, xTitle) {
  plot.setAttribute("aria-label", inWords(title, traces, xTitle.toLowerCase()));
  Plotly.react(plot, traces, layout(cell, yTitle, xTitle), CONFIG);
}

// The metrics of the only curve by their colours.
function showNames(panel, traces) {
  const named = traces.filter((trace) => trace.hoverinfo !== "skip");
  const isNeeded = data.cells[shownCell].curves.length === 1 && named.length > 1;
  panel.names.replaceChildren(...(isNeeded ? named : []).map((trace) =>
    element("span", {}, swatch(trace.line.color, trace.line.dash), trace.name)));
}

const swatch = (color, dash) => element("span", { class: "swatch", style: `border-top: 3px ${dash === "dash" ? "dashed" : "solid"} ${color}` });

function drawPanel(panel) {
  const cell = data.cells[shownCell];
  const chosen = panel.select.value;
  let metrics = chosen === "*" ? panel.metrics : [chosen];
  if (chosen === "entropy/policy") metrics = ["entropy/policy", "entropy/reference"];
  const traces = tracesOf(cell, metrics);
  showNames(panel, traces);
  draw(panel.plot, panel.title, cell, traces, chosen === "*" ? "" : cell.labels[chosen] || chosen, "Step");
}

function drawFrontier(plot) {
  const cell = data.cells[shownCell];
  const traces = [];
  cell.frontier.arms.forEach((arm) => {
    const number = cell.curves.findIndex((curve) => curve.name === arm.name);
    const color = colourOf(number);
    if (hiddenArms.has(arm.name)) return;
    for (const run of arm.runs) {
      traces.push({ x: run.x, y: run.y, mode: "lines", line: { color, width: 1 }, opacity: 0.4, showlegend: false, name: `${arm.name}, seed ${run.seed}` });
      traces.push({ x: run.x.slice(-1), y: run.y.slice(-1), mode: "markers", marker: { color, size: 6 }, showlegend: false, name: `${arm.name}, seed ${run.seed}, end` });
    }
    const points = arm.mean.x.map((x, i) => ({ x, mean: arm.mean.y[i], error: arm.mean.error[i] }));
    traces.push(...lines(arm.name, points, { color, x: "x" }));
  });
  draw(plot, "Frontier", cell, traces, cell.frontier.score, "Root of the exact KL");
}

let drawAll = () => {};

function buildPanels() {
  const cell = data.cells[shownCell], box = byId("panels");
  box.querySelectorAll(".plot").forEach((plot) => Plotly.purge(plot));
  box.replaceChildren();
  const alone = cell.curves.length === 1;
  const drawers = cell.panels.map((panel) => {
    const all = alone && panel.metrics.length > 1 && panel.title !== ANY;
    const options = panel.metrics.map((name) => element("option", { value: name, selected: name === panel.first && !all }, name));
    if (all) options.unshift(element("option", { value: "*" }, "all"));
    const select = element("select", { "aria-label": `Metric of ${panel.title}` }, ...options);
    const plot = element("div", { class: "plot", role: "img" });
    const names = element("p", { class: "names" });
    const own = { ...panel, select, plot, names };
    select.addEventListener("change", () => drawPanel(own));
    box.append(element("div", { class: "panel" }, element("h3", {}, panel.title, select), plot, names));
    return () => drawPanel(own);
  });
  if (cell.frontier.arms && !alone) {
    const plot = element("div", { class: "plot", role: "img", id: "frontier" });
    box.append(element("div", { class: "panel" }, element("h3", {}, "Score at equal divergence"), plot));
    drawers.push(() => drawFrontier(plot));
  }
  drawAll = () => drawers.forEach((drawer) => drawer());
  drawAll();
}

function buildArms() {
  const box = byId("arms"), cell = data.cells[shownCell];
  box.querySelectorAll("label").forEach((label) => label.remove());
  box.hidden = cell.curves.length < 2;
  cell.curves.forEach((curve, number) => {
    const check = element("input", { type: "checkbox", checked: !hiddenArms.has(curve.name), onchange: () => {
      if (check.checked) hiddenArms.delete(curve.name); else hiddenArms.add(curve.name);
      drawAll();
    } });
    const seeds = curve.runs.length > 1 ? ` (${curve.runs.length} seeds)` : "";
    box.append(element("label", {}, check, swatch(colourOf(number)), curve.name + seeds));
  });
  byId("bands").parentElement.hidden = cell.curves.every((curve) => curve.runs.length < 2);
}

function startCurves() {
  for (const id of ["marks", "bands"]) byId(id)?.addEventListener("change", () => drawAll());
  byId("window").addEventListener("input", () => {
    byId("window-value").textContent = byId("window").value;
    drawAll();
  });
  byId("cell")?.addEventListener("change", () => {
    shownCell = Number(byId("cell").value);
    buildArms();
    buildPanels();
  });
  buildArms();
  buildPanels();
}

// Fixed prompts.

// A line where not all steps fitted into the file.
function leftOut(number, all, done) {
  return number < all ? [element("p", { class: "hint" }, `${number} of ${all} ${done} steps are in this file.`)] : [];
}

const chosenRun = { fixed: 0, images: 0, compare: 0 };

function showFixed() {
  const { drawn, prompts, steps } = data.runs[chosenRun.fixed].fixed, box = byId("fixed-rows");
  if (!steps.length) {
    const none = element("p", {}, "The run drew none; run.fixed_prompts does.");
    box.replaceChildren(...(drawn ? leftOut(0, drawn, "drawn") : [none]));
    return;
  }
  const head = element("tr", {}, element("th", { scope: "col" }, "prompt"), ...steps.map(({ step }) =>
    element("th", { scope: "col" }, step ? `step ${step}` : "base")));
  const rows = prompts.map((prompt, row) => element("tr", {}, element("th", { scope: "row" }, prompt), ...steps.map(({ step, images }) =>
    element("td", {}, picture(images[row], `${prompt}, step ${step}`)))));
  const table = element("table", { class: "rows" }, element("thead", {}, head), element("tbody", {}, ...rows));
  box.replaceChildren(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Fixed prompts by step" }, table), ...leftOut(steps.length, drawn, "drawn"));
}

// Logged images and token maps.

const PAIRS = "pairs";
let reference = 0;

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// 256 colours between the stops of a scale.
function palette(name) {
  const stops = data.scales[name].map((stop) => {
    if (!stop.startsWith("#")) return stop.match(/[\d.]+/g).slice(0, 3).map(Number);
    return [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16));
  });
  return Array.from({ length: 256 }, (_, level) => {
    const at = level / 255 * (stops.length - 1), left = Math.min(Math.floor(at), stops.length - 2);
    return stops[left].map((value, i) => Math.round(value + (stops[left + 1][i] - value) * (at - left)));
  });
}
const PALETTES = { sequential: palette("sequential"), signed: palette("signed") };

// The chosen map of each image of a step, and what its bytes stand for; null where there is none.
function mapsOf(run, step) {
  const name = byId("map").value, [rows, columns] = run.grid;
  if (!name || !step.group_size || !rows) return null;
  const tokens = rows * columns, size = step.group_size;
  if (name === PAIRS) {
    if (!step.pairs) return null;
    const all = bytes(step.pairs), perGroup = size * (size - 1) / 2, group = Math.floor(reference / size);
    const one = reference % size;
    const place = (i, j) => i * size - i * (i + 1) / 2 + j - i - 1;
    const of = (image) => {
      const other = image % size;
      if (Math.floor(image / size) !== group || other === one) return null;
      const start = (group * perGroup + place(Math.min(one, other), Math.max(one, other))) * tokens;
      return all.subarray(start, start + tokens);
    };
    return { of, low: -1, high: 1, colours: PALETTES.sequential };
  }
  const about = run.images.maps.find((map) => map.name === name);
  if (!about || !step.maps[name]) return null;
  const all = bytes(step.maps[name]);
  const of = (image) => all.subarray(image * tokens, (image + 1) * tokens);
  return { of, ...about, colours: PALETTES[about.signed ? "signed" : "sequential"] };
}

function paint(canvas, levels, colours) {
  const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
  levels.forEach((level, i) => pixels.data.set([...colours[level], 255], 4 * i));
  context.putImageData(pixels, 0, 0);
}

function valueText(maps, level) {
  return (maps.low + level / 255 * (maps.high - maps.low)).toPrecision(3);
}

function showLegend(maps) {
  byId("legend").hidden = !maps;
  const isPairs = byId("map").value === PAIRS;
  byId("map-hint").textContent = isPairs ? "Choose the image that the others of its group are compared with." : "";
  if (!maps) return;
  byId("legend-low").textContent = maps.low.toPrecision(3);
  byId("legend-high").textContent = maps.high.toPrecision(3);
  byId("legend-bar").style.background = `linear-gradient(to right, ${maps.colours.map((c) => `rgb(${c})`).join(",")})`;
  byId("map-value").textContent = "";
}

function scoreText(image) {
  return image.reward === null ? "no score" : image.reward.toFixed(2);
}

function tile(run, step, number, maps) {
  const image = step.images[number], levels = maps && maps.of(number);
  const isReference = byId("map").value === PAIRS && number === reference;
  const alt = `Image ${number % (step.group_size || 1) + 1} of '${image.prompt}', step ${step.step}, ${image.reward === null ? "" : "reward "}${scoreText(image)}: ${image.reason}`;
  const frame = element("button", { class: "frame", type: "button", "aria-pressed": isReference ? "true" : "false" }, picture(image.source, alt));
  if (levels) {
    const [rows, columns] = run.grid, canvas = element("canvas", { width: columns, height: rows, "aria-hidden": "true" });
    canvas.style.opacity = byId("opacity").value / 100;
    paint(canvas, levels, maps.colours);
    frame.append(canvas);
    const mean = levels.reduce((a, b) => a + b, 0) / levels.length;
    frame.addEventListener("focus", () => {
      byId("map-value").textContent = `mean ${valueText(maps, mean)}, from ${valueText(maps, Math.min(...levels))} to ${valueText(maps, Math.max(...levels))}`;
    });
    frame.addEventListener("pointermove", (event) => {
      const box = frame.getBoundingClientRect();
      const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
      const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
      byId("map-value").textContent = `row ${row + 1}, column ${column + 1}: ${valueText(maps, levels[row * columns + column])}`;
    });
  }
  frame.addEventListener("click", () => {
    reference = number;
    if (run.images.steps.some((one) => one.pairs)) byId("map").value = PAIRS;
    showImages();
    byId("groups").querySelectorAll(".frame")[number].focus();
  });
  return element("figure", { class: "tile" }, frame, element("figcaption", {}, element("strong", {}, scoreText(image)), image.reason));
}

function showImages() {
  const run = data.runs[chosenRun.images], { logged, steps } = run.images;
  const step = steps[byId("step").value], box = byId("groups");
  if (!step) {
    const none = element("p", {}, "The run kept no images with their places; run.log_images_every does.");
    box.replaceChildren(...(logged.length ? leftOut(0, logged.length, "logged") : [none]));
    byId("step").disabled = true;
    return;
  }
  byId("step").disabled = false;
  byId("step-value").textContent = String(step.step);
  byId("step").setAttribute("aria-valuetext", `step ${step.step}`);
  const maps = mapsOf(run, step), size = step.group_size || step.images.length;
  showLegend(maps);
  const groups = [];
  for (let first = 0; first < step.images.length; first += size) {
    const tiles = [];
    for (let number = first; number < Math.min(first + size, step.images.length); number++) {
      tiles.push(tile(run, step, number, maps));
    }
    groups.push(element("h3", {}, step.images[first].prompt), element("div", { class: "tiles" }, ...tiles));
  }
  groups.push(...leftOut(steps.length, logged.length, "logged"));
  box.replaceChildren(...groups);
}

function startImages() {
  const { steps, maps } = data.runs[chosenRun.images].images, kept = byId("map").value;
  const options = [["", "none"], ...maps.map((map) => [map.name, map.label])];
  if (steps.some((step) => step.pairs)) options.push([PAIRS, "Similarity with one image"]);
  byId("map").replaceChildren(...options.map(([value, label]) => element("option", { value, selected: value === kept }, label)));
  byId("step").max = Math.max(0, steps.length - 1);
  byId("step").value = steps.length - 1;
  reference = 0;
  showImages();
}

// Before and after.

const isRight = (value) => value === 1;

function change(pair) {
  if (pair.trained.value === null || pair.base.value === null) return "unknown";
  if (pair.trained.value === pair.base.value) return "same";
  return pair.trained.value > pair.base.value ? "gained" : "lost";
}

function mark(name, { value }) {
  if (value === null) return element("span", { class: "mark" }, `${name} not scored`);
  const isVerdict = value === 0 || value === 1;
  const text = isVerdict ? (isRight(value) ? "✓ right" : "✗ wrong") : value.toFixed(2);
  return element("span", { class: isVerdict ? `mark ${isRight(value) ? "right" : "wrong"}` : "mark" }, `${name} ${text}`);
}

function slide(stack, input) {
  stack.style.setProperty("--at", `${input.value}%`);
  stack.lastChild.style.clipPath = `inset(0 0 0 ${input.value}%)`;
}

function showPairs() {
  const pairs = data.runs[chosenRun.compare].before_after, box = byId("pairs"), wanted = byId("changed").value;
  byId("compare-controls").hidden = !pairs.length && data.runs.length < 2;
  if (!pairs.length) {
    byId("compare-count").textContent = "The run has no comparison with its base; evaluation.images_per_task makes one.";
    box.replaceChildren();
    return;
  }
  const count = (kind) => pairs.filter((pair) => change(pair) === kind).length;
  byId("compare-count").textContent = `Of ${pairs.length} images ${count("gained")} gained, ${count("lost")} lost, ${count("same")} unchanged.`;
  box.replaceChildren(...pairs.filter((pair) => !wanted || change(pair) === wanted).map((pair) => {
    const about = `'${pair.prompt}', image ${pair.image + 1}`;
    const stack = element("div", { class: "stack" }, picture(pair.base.source, `base, ${about}`), picture(pair.trained.source, `trained, ${about}`));
    const input = element("input", { type: "range", min: 0, max: 100, value: byId("slide-all").value, "aria-label": `Base beside trained, ${about}` });
    input.addEventListener("input", () => slide(stack, input));
    slide(stack, input);
    return element("figure", { class: "pair", "data-change": change(pair) }, stack, input,
      element("figcaption", {}, mark("base", pair.base), " → ", mark("trained", pair.trained), element("br"), pair.prompt));
  }));
}

function startPairs() {
  byId("slide-all").addEventListener("input", () => {
    byId("pairs").querySelectorAll("input").forEach((input) => {
      input.value = byId("slide-all").value;
      input.dispatchEvent(new Event("input"));
    });
  });
  byId("changed").addEventListener("change", showPairs);
  showPairs();
}

// The page.

function recolour() {
  buildArms();
  drawAll();
}

byId("theme").addEventListener("change", () => {
  const theme = byId("theme").value;
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  recolour();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
startCurves();
if (data.runs.length) {
  const shows = { fixed: showFixed, images: startImages, compare: showPairs };
  document.querySelectorAll("select.run").forEach((select) => select.addEventListener("change", () => {
    chosenRun[select.dataset.for] = Number(select.value);
    shows[select.dataset.for]();
  }));
  byId("step").addEventListener("input", showImages);
  byId("map").addEventListener("change", showImages);
  byId("opacity").addEventListener("input", () => {
    document.querySelectorAll(".frame canvas").forEach((canvas) => { canvas.style.opacity = byId("opacity").value / 100; });
  });
  showFixed();
  startImages();
  startPairs();
}
document.documentElement.dataset.ready = "yes";
