"""lm-eval's own multiple choice over MatryoshkaCache, and evaluate.py's of the same questions.

lm-eval passes no cache, so its model class is given one here: a fresh MatryoshkaCache at each call.
The task is a file of ours, in evaluate.py's format, nothing comes from a hub:

    pip install transformers==5.24.0 lm-eval[hf]==0.4.13
    python bench/harness.py --ckpt ../smollm2 --out rotations/smollm2-135m

Both count a choice's log-likelihood from the token on that follows the context without the white
space at its end: a line break that ends a context is scored as part of the answer, here as there.
"""
import contextlib
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adapters.transformers_cache import MatryoshkaCache
from evaluate import answer, read_questions, tokens_of
from model import load
from projection import Projection, plan_at
from support import cli
from support.plans import PROJECTIONS, order_beside
from support.tokenizer import load_tokenizer

TASK = "ours"


def task_in(folder: Path, questions: Path) -> None:
    """lm-eval's description of a task."""
    (folder / f"{TASK}.yaml").write_text(json.dumps({       # JSON is YAML
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }))


def harness(args, make_cache) -> dict[str, float]:
    """Accuracy by lm-eval, by log-likelihood and by that per character."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class WithCache(HFLM):
        def _model_call(self, inps, attn_mask=None, labels=None):
            with torch.no_grad():
                cache = make_cache(self.model) if make_cache else None
                return self.model(inps, cache=cache).logits

    model = WithCache(pretrained=str(args.ckpt), dtype="float32", device=args.device, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        task_in(Path(folder), args.tasks)
        found = lm_eval.simple_evaluate(
            model=model, tasks=[TASK], bootstrap_iters=0, log_samples=False,
            task_manager=TaskManager(include_path=folder, include_defaults=False))
    found = found["results"][TASK]
    return {"accuracy": found["acc,none"], "accuracy_by_character": found["acc_norm,none"]}


def main():
    parser = cli.arguments(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder of the projections and order [out]")
    add("--tasks", type=Path, default=ROOT / "demo" / "questions.jsonl", help="[the demo's]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    model, tokenizer = load(args.ckpt, device, dtype), load_tokenizer(args.ckpt)
    p = Projection.load(args.out / PROJECTIONS).to(device)
    _, order = order_beside(args.out / PROJECTIONS, p, model.config)
    questions = read_questions(args.tasks)
    tokens = [tokens_of(tokenizer, question) for question in questions]
    print(f"{args.tasks}: {len(questions)} questions, accuracy by log-likelihood (per character)\n")
    print(f"{'cache':>10s}{'evaluate.py':>20s}{'lm-eval':>20s}")
    for budget in (None, 1.0, 0.75, 0.5, 0.25):
        ranks = plan_at(order, model.config, budget or 1.0)
        ours = answer(model, questions, tokens, p, ranks)
        make = budget and partial(MatryoshkaCache, projections=p, ranks=ranks)
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = harness(args, make)
        columns = (f"{100 * x['accuracy']:.2f} ({100 * x['accuracy_by_character']:.2f})"
                   for x in (ours, theirs))
        print(f"{'none' if budget is None else f'{budget:.0%}':>10s}"
              + "".join(f"{column:>20s}" for column in columns), flush=True)


if __name__ == "__main__":
    cli.run_script(main)
