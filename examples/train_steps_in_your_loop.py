"""The whole method in one loop of your own: SFT on a teacher's text, then GhostRespond at the student's own replies."""

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo import Pair, TrainState, jit_step, make_grpo_step, make_optimizer, make_sft_step
from cotgrpo.data.batches import make_batches
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.teachers.procedural import ProceduralTeacher

STEPS, BATCH, COLUMNS, NEW_TOKENS, REPLIES = 60, 8, 128, 48, 16

# 1. Rows: (question, rationale, answer), here from a teacher that writes sums. Each becomes one sequence.
rows = ProceduralTeacher(seed=0, kinds=("column_addition",), digits=1).draw(400)
questions = ProceduralTeacher(seed=1, kinds=("column_addition",), digits=1).draw(400)
tokenizer = train_tokenizer((f"{row.question}\n{row.rationale}\n{row.answer}" for row in rows), vocab_size=320)
template = Template(tokenizer, loss_on="completion")
config = DecoderConfig(
    vocab_size=len(tokenizer), width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=192
)
student = make_student(config)


def trained(name, params, make_step, batches, rate, steps):
    """Run a pure step over batches, which may depend on the parameters, and return the new parameters."""
    tx = make_optimizer(learning_rate=rate, total_steps=steps)  # or any optax transformation
    step = jit_step(make_step(tx))  # (state, batch) -> (state, metrics); give a mesh to spread it
    state, losses = TrainState.create(params=params, tx=tx, key=0), []
    for number in range(steps):
        state, metrics = step(state, batches(state.params, number))
        losses.append(float(metrics["loss"].mean()))
    print(f"{name} loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-5:]):.3f}")
    return state.params


def sft(name, seed, data, steps):
    """Train a student of this shape on text, with the next-token loss."""
    packed = make_batches([template.encode(row) for row in data], batch_size=BATCH, seq_len=COLUMNS, seed=seed)
    make_step = lambda tx: make_sft_step(student, tx)
    return trained(name, init_params(config, jax.random.key(seed)), make_step, lambda *_: next(packed), 3e-3, steps)


# 2. SFT: the student sees few rows. The live teacher is the same model, trained for longer.
params = sft("SFT", 0, rows[:100], STEPS)
teacher = sft("teacher", 1, rows, 4 * STEPS)

# 3. GhostRespond: the student draws replies, and the teacher names the ghost token y* after each of their prefixes.
prompts = [template.prompt(row.question) for row in questions]
longest = max(map(len, prompts))
settings = SamplingSettings(NEW_TOKENS, template.stop_ids, temperature=1.0, pad_id=template.pad_id)
sample = make_sampler(config, settings)


@jax.jit
def drawn(params, asked, key):
    """Return the student's replies as contexts, each with y* and the drawn y: a `GhostBatch`."""
    return live_ghosts(student, teacher, asked, sample(params, asked, key))


def on_policy(params, number):
    """Return a batch of new replies, with the parameters of now."""
    chosen = np.random.default_rng(number).choice(len(prompts), REPLIES, replace=False)
    asked = pad_prompts([prompts[i] for i in chosen], length=longest, pad_id=template.pad_id)
    return drawn(params, jax.tree.map(jnp.asarray, asked), jax.random.key(number))


params = trained("GRPO", params, lambda tx: make_grpo_step(student, tx, Pair()), on_policy, 1e-3, STEPS)
