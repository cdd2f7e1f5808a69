"""Learn at the student's own replies from a teacher on a server, which scores each of their tokens.

python examples/runs/server_teacher.py [URL]    # vLLM: vllm serve MODEL --max-logprobs 20. Without: a stand-in, below
"""

import json
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.models import load_pretrained
from cotgrpo.quickstart.quickstart import TEACHER
from cotgrpo.runs import Run
from cotgrpo.teachers.procedural import ProceduralTeacher

STUDENT = {"width": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "mlp_width": 96}
K, COLUMNS = 8, 192


def stand_in() -> ThreadingHTTPServer:
    """Return a server that answers as vLLM's completions do with `prompt_logprobs`: the likeliest at each token."""
    model, tokenizer = load_pretrained(TEACHER), load_tokenizer(TEACHER)
    place = jnp.arange(COLUMNS)[None]
    score = jax.jit(lambda ids: jax.nn.log_softmax(model.student.logits(model.params, ids, place, ids * 0 + 1)[0]))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                return self.send_error(404)
            ids = body["prompt"]
            ids = tokenizer.encode(ids, add_special_tokens=False) if isinstance(ids, str) else ids
            rows = np.asarray(score(jnp.asarray([ids + [0] * (COLUMNS - len(ids))])))
            entries = [None]
            for row, own in zip(rows, ids[1:], strict=False):
                likeliest = np.argsort(-row)[: body["prompt_logprobs"]]
                entries.append({str(i): {"logprob": float(row[i])} for i in dict.fromkeys([own, *likeliest.tolist()])})
            choice = {"text": "", "prompt_logprobs": entries, "finish_reason": "length"}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        log_message = lambda *_: None

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def main(folder: Path, url: str) -> tuple[float, float]:
    """Train at the student's own replies. Return the held-out loss before and after."""
    drawn = ProceduralTeacher(seed=0, kinds=("column_addition",)).draw(200)
    rows = [{"question": t.question, "rationale": t.rationale, "answer": t.answer} for t in drawn]
    data = {"seq_len": 160, "test_rows": 16, "loss_on": "completion"}
    small = {"rows": 16, "max_new_tokens": 16}
    run = Run(folder / "run", student=STUDENT, tokenizer=str(TEACHER), train=rows, data=data, eval=small)
    run.sft(steps=20, batch_size=8, optimizer={"learning_rate": 3e-3})  # replies of some sense, to be scored
    ghosts = {"source": "teacher_server", "base_url": url, "dialect": "vllm", "max_new_tokens": 24}
    objective = {"name": "forward_kl", "top_k": K}  # the whole list of the teacher, not its first choice alone
    report = run.grpo(steps=10, batch_size=8, ghosts=ghosts, objective=objective, optimizer={"learning_rate": 3e-3})
    losses = report["held_out_loss"]
    print(f"loss {losses['sft']:.3f} -> {losses['grpo']:.3f}")
    return losses["base"], losses["grpo"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        server = stand_in()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        main(Path(own), *(sys.argv[1:] or [f"http://127.0.0.1:{server.server_port}/v1"]))
        server.shutdown()
        server.server_close()
