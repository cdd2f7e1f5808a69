"""Whole runs from Python: rows and settings in, the trained student out. The command line calls the same class.

from cotgrpo.runs import Run

run = Run("runs/sums", student="HuggingFaceTB/SmolLM2-135M-Instruct", train=rows, data={"format": "chat"})
run.sft(steps=300)
run.grpo(steps=100, ghosts={"source": "privileged_self"})
print(run.evaluate()["accuracy"])
print(run.model().reply("What is 17 + 25?"))
run.save("my-student")
"""

from cotgrpo.runs.run import Run
from cotgrpo.runs.trained import Trained

__all__ = ["Run", "Trained"]
