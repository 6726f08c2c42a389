"""DeQA-Score (arXiv 2501.11561) as a program for `kind: external`.

Its code was written for transformers 4.36 and works up to 4.46, so it needs an environment of its
own:

    python -m venv deqa && deqa/bin/pip install "transformers==4.46.3" torch accelerate \
        sentencepiece protobuf icecream pillow

The model has 8.2 billion parameters: about 16.4 GB of GPU memory in half precision.
"""

import json
import sys


def load():
    """From a path to a score between 1 (bad) and 5 (excellent)."""
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        "zhiyuanyou/DeQA-Score-Mix3",
        trust_remote_code=True,
        attn_implementation="eager",
        torch_dtype=torch.float16,
        device_map="auto",
    )

    def score(path):
        with torch.inference_mode():
            return float(model.score([Image.open(path).convert("RGB")])[0])

    return score


def main():
    """Answers each line of standard input with a line on standard output, until it ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    score = load()
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"id": request["id"]}
        try:
            value = score(request["image"])
            answer |= {"score": value, "why": f"quality {value:.2f} of 5"}
        except Exception as error:  # one bad image costs its own group, not the run
            answer |= {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
