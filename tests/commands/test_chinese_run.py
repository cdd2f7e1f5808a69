"""A whole run in Chinese: a teacher's replies, a tokenizer and a chat student from scratch, SFT, GRPO, a report."""

from __future__ import annotations

import html
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import read
from helpers.faulty_server import completion, send

from cotgrpo.cli import main
from cotgrpo.data.tokenizer import UNDECODABLE, load_tokenizer
from cotgrpo.data.triples import read_triples
from cotgrpo.logs.completions import read_completions
from cotgrpo.teachers.procedural import ProceduralTeacher

pytest.importorskip("openai")

SETTINGS = """
student: {width: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16, mlp_width: 64}
tokenizer: {vocab_size: 420}
data: {format: chat, answer_format: "最终答案：{answer}", system: 你是一位数学老师。, seq_len: 320, test_rows: 12}
sft: {steps: 30, batch_size: 4, log_every: 10, eval_every: 30, optimizer: {learning_rate: 1.0e-2}}
grpo: {steps: 4, batch_size: 3, log_every: 2, eval_every: 4, optimizer: {learning_rate: 1.0e-3}}
eval: {rows: 12, batch_size: 12, max_new_tokens: 33}
checkpoint: {every: 30}
"""
RIGHT = [
    "{rationale}\n答案是{answer}。",
    "{rationale}\n答案：{answer}",
    "{rationale}\n答：{answer}",
    "{rationale}\n所以，最终答案为 **{answer}**。（共用了2步）",
    "{rationale}\n\\boxed{{{answer}}}",
    "{rationale}\n#### {answer}",
    "<think>\n{rationale}\n</think>\n\n因此答案是{answer}。",
]
HARD = {
    "气温是2度，下降5度后是多少度？": ("-3", "2-5=-3\n答案是－3度。"),
    "一个蛋糕平均分成4块，吃掉1块，还剩几分之几？": ("3/4", "4-1=3\n答案是3/4。"),
    "全班40人，出席30人，出席率是多少？": ("75%", "30÷40=0.75\n出席率是７５％。"),
    "一本书１２元，买3本要多少元？": ("３６", "１２×3=36\n答：一共要36元。"),
}


@pytest.fixture(scope="module")
def questions() -> list[dict[str, str]]:
    """Problems of every kind. Some golds have their unit, others have none."""
    drawn = ProceduralTeacher(seed=11, language="zh").draw(66)
    rows = [
        {"question": t.question, "gold": t.answer if n % 3 else t.answer.rstrip("个支本颗只元")}
        for n, t in enumerate(drawn)
    ]
    return rows + [{"question": question, "gold": gold} for question, (gold, _) in HARD.items()]


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    """Run a teacher that answers in Chinese. Each eleventh answer is wrong, each ninth is cut off."""
    known = {t.question: (n, t) for n, t in enumerate(ProceduralTeacher(seed=11, language="zh").draw(66))}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"].splitlines()[-1]
            if question in HARD:
                send(self, 200, completion(HARD[question][1]))
                return
            number, triple = known[question]
            answer = "1000000元" if number % 11 == 5 else triple.answer
            text = RIGHT[number % len(RIGHT)].format(rationale=triple.rationale, answer=answer)
            send(self, 200, completion(text, "length" if number % 9 == 4 else "stop"))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(teacher: str, questions: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the questions, the teacher's triples and a run of every stage."""
    folder = tmp_path_factory.mktemp("chinese")
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{SETTINGS}", encoding="utf-8")
    asked = folder / "questions.jsonl"
    asked.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions), encoding="utf-8")
    prompt = "请一步一步地解答，最后写出答案。\n\n{question}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-test-chinese-run")
        patch.delenv("OPENAI_BASE_URL", raising=False)
        generate = ["generate", "--questions", str(asked), "--out", str(folder / "out"), "--prompt.question", prompt]
        assert main([*generate, "--teacher.base_url", teacher, "--teacher.model", "laoshi"]) == 0
    config = ["--config", str(folder / "c.yaml"), "--data.train", str(folder / "out" / "triples.jsonl")]
    assert main(["sft", *config]) == 0
    assert main(["grpo", *config]) == 0
    own = ["--grpo.init_from", str(folder / "run" / "sft"), "--grpo.ghosts.source", "privileged_self"]
    own += ["--grpo.ghosts.max_new_tokens", "33", "--grpo.log_every", "1", "--data.seq_len", "448"]
    assert main(["grpo", *config, "--run_dir", str(folder / "own"), *own]) == 0
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
    return folder


def test_the_teachers_right_replies_are_kept(run: Path, questions: list[dict[str, str]]) -> None:
    """Whatever the words before the answer, its unit, its sign and the width of its digits."""
    wrong, cut = {n for n in range(66) if n % 11 == 5}, {n for n in range(66) if n % 9 == 4}
    triples, report = read_triples(run / "out" / "triples.jsonl")
    right = [row["question"] for n, row in enumerate(questions) if n not in wrong | cut]
    assert [t.question for t in triples] == right and not report.dropped
    assert all("算" in t.rationale for t in triples if t.question not in HARD)
    assert not any("think>" in t.rationale or "####" in t.rationale for t in triples)


def test_the_tokenizer_keeps_digits_apart_and_renders_chats(run: Path) -> None:
    tokenizer = load_tokenizer(run / "run" / "sft" / "tokenizer")
    chat = [{"role": "user", "content": "１２+34等于多少？"}]
    prompt = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    words = [tokenizer.decode([i]) for i in ids if "\ufffd" not in tokenizer.decode([i])]
    assert words[0] == "<|user|>" and words[-2:] == ["<eos>", "<|assistant|>"]
    assert not any(len(word) > 1 and any(c.isdecimal() for c in word) for word in words)


def test_no_file_has_replacement_characters(run: Path) -> None:
    texts = [p for p in run.rglob("*") if p.suffix in {".json", ".jsonl", ".html", ".yaml", ".md", ".svg", ".txt"}]
    assert len([p for p in texts if p.name == "completions.jsonl"]) == 1
    found = [p for p in texts if "\ufffd" in p.read_text(encoding="utf-8")]
    # A page shows DEL and marks of the direction of writing so, and the student may write any character.
    marks = re.compile("[\x7f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
    has_marks = any(marks.search(p.read_text(encoding="utf-8")) for p in texts)
    assert not [p for p in found if p.suffix != ".html" or not has_marks]
    # The student is too small for the task, and cut off inside of characters.
    assert any(UNDECODABLE in p.read_text(encoding="utf-8") for p in texts)


def test_completions_are_made_of_whole_characters(run: Path) -> None:
    rows = read_completions(run / "own" / "grpo", 100)
    assert rows
    for row in rows:
        assert "".join(row["tokens"]) == row["text"]
        assert len(row["tokens"]) == len(row["counts"]) == len(row["ghosts"]) == len(row["rewards"])
    assert any(count > 1 for row in rows for count in row["counts"])


def test_the_report_is_in_chinese(run: Path, questions: list[dict[str, str]]) -> None:
    for stage in ("run/sft", "run/grpo", "own/grpo"):
        page = html.unescape((run / stage / "report.html").read_text(encoding="utf-8"))
        report = read(run / stage / "report.json")
        assert report["samples"][0]["question"] in page and "answer_format: 最终答案：{answer}" in page
        assert '<meta charset="utf-8">' in page
    loss = read(run / "run" / "sft" / "report.json")["held_out_loss"]
    assert loss["sft"] < 0.7 * loss["base"]
    measured = read(run / "run" / "grpo" / "eval.json")
    assert {reply["question"] for reply in measured["replies"]} <= {row["question"] for row in questions}
