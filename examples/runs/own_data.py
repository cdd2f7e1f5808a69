"""Train on rows of a layout of your own: a file, columns of other names, and a function for what a name cannot say."""

import json
import tempfile
from pathlib import Path

from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher

STUDENT = {"width": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "mlp_width": 96}


def write_export(path: Path) -> None:
    """Write what another program might export: votes, a nested solution, and one text of question and reply."""
    lines = []
    for number, row in enumerate(ProceduralTeacher(seed=0, digits=1).draw(200)):
        solution = {"steps": row.rationale, "final": row.answer}
        text = f"{row.question} ### {row.rationale}\n#### {row.answer}"
        line = {"problem_text": row.question, "solution": solution, "votes": number % 4, "text": text}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines), encoding="utf-8")


def of_my_layout(row: dict) -> dict | None:
    """Return a row of a known layout, or None to leave it out."""
    if row["votes"] < 1:
        return None
    question, _, reply = row["text"].partition(" ### ")
    return {"question": question, "completion": reply}


def main(folder: Path) -> tuple[float, float]:
    """Train twice, on the same file read in two ways. Return the held-out loss before and after."""
    write_export(folder / "export.jsonl")
    # This library's names, and yours. A dot goes into an object.
    columns = {"question": "problem_text", "rationale": "solution.steps", "answer": "solution.final"}
    for name, layout in {"columns": {"columns": columns}, "function": {"row_function": of_my_layout}}.items():
        run = Run(
            folder / name,
            student=STUDENT,
            train=str(folder / "export.jsonl"),  # or a folder, a pattern, a hub id, a list of dicts, a data frame
            tokenizer={"vocab_size": 320},
            data={"seq_len": 256, "test_rows": 16, **layout},
            eval={"rows": 16, "max_new_tokens": 16},
        )
        losses = run.sft(steps=20, batch_size=8, optimizer={"learning_rate": 3e-3})["held_out_loss"]
    print(f"loss {losses['base']:.3f} -> {losses['sft']:.3f}")
    return losses["base"], losses["sft"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        main(Path(own))
