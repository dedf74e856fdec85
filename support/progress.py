"""Progress of a long run: how far it is, and how long it will take."""
import sys
import time

from support.processes import RANK


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every ten seconds.

    It says at once what begins, `before` steps of it done. Called after steps, of `total`, with the
    number of the last, a text, and how many tokens they took.
    """

    def __init__(self, total: int, what: str = "step", before: int = 0):
        self.total, self.what, self.before = total, what, before
        self.began = time.time()
        self.shown = 0.0
        self.tokens = 0
        self.show(f"{what} {before:,}/{total:,}")

    def __call__(self, step: int, text: str = "", tokens: int = 0) -> None:
        self.tokens += tokens
        now, last = time.time(), step == self.total
        if now - self.shown < (0.2 if sys.stderr.isatty() else 10) and not last:
            return
        self.shown = now
        seconds = now - self.began
        minutes_left = (self.total - step) * seconds / (step - self.before) / 60
        text = f"  {text}" if text else ""
        speed = f"  {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        self.show(f"{self.what} {step:,}/{self.total:,}{text}{speed}  {minutes_left:.1f} min left",
                  last)

    def show(self, line: str, last: bool = False) -> None:
        if RANK:
            return
        if sys.stderr.isatty():
            print(f"\r{line:<79s}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
