"""Reward replies by a function of your own, with group-relative updates: several replies to a question, each rewarded.

Here the reward counts sevens, so a student of a few thousand parameters can learn it in seconds.
"""

import tempfile
from pathlib import Path

from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher

STUDENT = {"width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64}
LONGEST = 24


def sevens(reply: str, gold: str, row: dict) -> float:
    """Return a number: any function of the reply, the right answer, and the row with all its columns."""
    return float(gold in reply) + reply.count("7") / LONGEST


def main(folder: Path) -> tuple[float, float]:
    """Train with the reward. Return its mean at first and at last."""
    drawn = ProceduralTeacher(seed=0, digits=1).draw(200)
    rows = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in drawn]
    run = Run(
        folder / "run",
        student=STUDENT,
        train=rows,
        tokenizer={"vocab_size": 300},
        data={"seq_len": 192, "test_rows": 8, "loss_on": "completion"},
        eval={"rows": 8, "max_new_tokens": LONGEST},
        verify={"reward": sevens},  # in a config file: verify.reward: my_module:sevens
    )
    run.sft(steps=20, batch_size=8, optimizer={"learning_rate": 3e-3})
    run.grpo(
        steps=30,
        batch_size=16,
        log_every=1,
        objective={"name": "group_relative"},
        ghosts={"source": "verified_reward", "num_generations": 8, "max_new_tokens": LONGEST},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
        max_entropy_growth=None,
    )
    logged = [row for row in read_metrics(folder / "run" / "grpo") if "train/reply_reward" in row]
    first, last = (sum(row["train/reply_reward"] for row in rows) / 5 for rows in (logged[:5], logged[-5:]))
    print(f"reward {first:.3f} -> {last:.3f}")
    return first, last


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        main(Path(own))
