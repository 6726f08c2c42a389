"""mPLUG, the judge of DPG-Bench (arXiv 2403.05135), as a program for `kind: external`.

ModelScope's pipeline needs an environment of its own:

    python -m venv mplug && mplug/bin/pip install -r ELLA/requirements-for-dpg_bench.txt

That list, in the repository of DPG-Bench (TencentQQGYLab/ELLA), names few versions.

It answers every question of a prompt with one word; `q0`, `q1`, ... are 1 where that is yes.
"""

import json
import sys

MODEL = "iic/mplug_visual-question-answering_coco_large_en"


def load():
    """From a path and a question to a short answer."""
    from modelscope.pipelines import pipeline  # pyright: ignore[reportMissingImports]
    from modelscope.utils.constant import Tasks  # pyright: ignore[reportMissingImports]

    ask = pipeline(Tasks.visual_question_answering, model=MODEL, device="gpu")
    return lambda path, question: ask({"image": path, "question": question})["text"]


def judge(ask, request):
    """The answers to a request: their mean, each of them, and what was said word for word."""
    questions = [one["text"] for one in request["metadata"]["questions"]]
    replies = [ask(request["image"], question) for question in questions]
    right = [float(reply == "yes") for reply in replies]
    return {
        "score": sum(right) / len(right),
        "why": ", ".join(
            f"{question} {reply}" for question, reply in zip(questions, replies, strict=True)
        ),
        "extras": {f"q{number}": value for number, value in enumerate(right)},
        "replies": replies,
    }


def main():
    """Answers each line of standard input with a line on standard output, until it ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    ask = load()
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"]}
        try:
            answer |= judge(ask, request)
        except Exception as error:  # one bad image costs its own group, not the run
            answer |= {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
