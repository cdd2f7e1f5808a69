"""Run the whole method from Python: rows, SFT, GRPO at the student's own replies, measure, ask, save, load again."""

import tempfile
from pathlib import Path

from cotgrpo.models import load_pretrained
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher

# For a real student: student="HuggingFaceTB/SmolLM2-135M-Instruct", data={"format": "chat"}, and rows of your own.
STUDENT = {"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_width": 192}
DATA = {"seq_len": 128, "test_rows": 20, "loss_on": "completion"}


def main(folder: Path) -> tuple[float, float]:
    """Train in two stages. Return the held-out loss before and after."""
    drawn = ProceduralTeacher(seed=0, kinds=("column_addition",), digits=1).draw(300)
    rows = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in drawn]
    run = Run(
        folder / "run",
        student=STUDENT,
        train=rows,
        data=DATA,
        tokenizer={"vocab_size": 320},
        eval={"rows": 20, "max_new_tokens": 48},
        checkpoint={"every": 30},
        seed=1,
    )
    run.sft(steps=60, batch_size=8, optimizer={"learning_rate": 3e-3})
    # The student that also sees the right answer is its own teacher. `teacher_model` and `teacher_server` are others.
    report = run.grpo(steps=10, batch_size=8, ghosts={"source": "privileged_self", "max_new_tokens": 48})

    measured = run.evaluate()
    print("accuracy", measured["accuracy"])
    print("a reply:", run.model().reply(rows[0]["question"], max_new_tokens=48))
    run.save(folder / "student")
    print("saved and loaded:", load_pretrained(folder / "student").config.width, "wide")

    # A stage that is complete returns its report at once, in another process too.
    again = Run.open(folder / "run")
    assert again.grpo()["held_out_loss"] == report["held_out_loss"]
    first, last = report["held_out_loss"]["base"], report["held_out_loss"]["grpo"]
    print(f"loss {first:.3f} -> {last:.3f}")
    return first, last


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        main(Path(own))
