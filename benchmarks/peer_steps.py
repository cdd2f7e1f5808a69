"""Five tasks of a person with a training loop, in cotgrpo and its peers: count the lines, or run them.

    python benchmarks/peer_steps.py                 # the lines that each function below takes
    python benchmarks/peer_steps.py cotgrpo         # run one library's tasks, in an environment that holds it

    sft        one update on a batch and an optimizer of one's own
    tokens     one update on the student's replies, with a teacher's judgement of each token
    objective  an objective of one's own, with an array that has a number for each token
    devices    the same update over several devices
    resume     stop after two updates, resume, and get what four updates in a row give, to the bit

A task's lines are those of its function's body. Models, batches and imports are not counted: `setup_*` makes them. What
tinker's service would run is written down as its 0.38 documents it, and does not run here.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
import numpy as np

B, T, V, D = 8, 16, 64, 32
TASKS = ("sft", "tokens", "objective", "devices", "resume")
PEERS = {"cotgrpo": "cotgrpo", "tunix": "google-tunix", "trl": "trl", "rlax": "rlax", "tinker": "tinker"}
RNG = np.random.default_rng(0)
IDS = RNG.integers(4, V, (B, T + 1)).astype(np.int32)
TRUST = RNG.random((B, T)).astype(np.float32)


def setup_cotgrpo(g: SimpleNamespace) -> None:
    import jax
    import optax
    import orbax.checkpoint as ocp

    import cotgrpo
    from cotgrpo.models.decoder import DecoderConfig, init_params, make_student

    sizes: dict[str, Any] = dict(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64)
    config = DecoderConfig(vocab_size=V, width=D, **sizes)
    ones = np.ones((B, T), np.int32)
    text = (IDS[:, :-1], IDS[:, 1:], np.tile(np.arange(T, dtype=np.int32), (B, 1)), ones, ones.astype(np.float32))
    g.jax, g.ocp, g.cotgrpo, g.tx, g.student = jax, ocp, cotgrpo, optax.adamw(1e-3), make_student(config)
    g.params = init_params(config, jax.random.key(0))
    g.batch = cotgrpo.SftBatch(*text, extra={"trust": TRUST})
    g.replies = cotgrpo.GhostBatch(*text)  # the ghosts are the teacher's ids at each prefix of the replies


def cotgrpo_sft(g: SimpleNamespace) -> Any:
    state = g.cotgrpo.TrainState.create(params=g.params, tx=g.tx, key=0)
    step = g.cotgrpo.jit_step(g.cotgrpo.make_sft_step(g.student, g.tx))
    state, metrics = step(state, g.batch)
    return metrics["loss"].mean()


def cotgrpo_tokens(g: SimpleNamespace) -> Any:
    state = g.cotgrpo.TrainState.create(params=g.params, tx=g.tx, key=0)
    step = g.cotgrpo.jit_step(g.cotgrpo.make_grpo_step(g.student, g.tx, g.cotgrpo.Pair()))
    state, metrics = step(state, g.replies)
    return metrics["loss"].mean()


def cotgrpo_objective(g: SimpleNamespace) -> Any:
    def trusted(logits_V: Any, token: Any) -> Any:
        return -token["trust"] * g.jax.nn.log_softmax(logits_V)[token.ghost], {}

    state = g.cotgrpo.TrainState.create(params=g.params, tx=g.tx, key=0)
    step = g.cotgrpo.jit_step(g.cotgrpo.make_sft_step(g.student, g.tx, trusted))
    state, metrics = step(state, g.batch)
    return metrics["loss"].mean()


def cotgrpo_devices(g: SimpleNamespace) -> Any:
    state = g.cotgrpo.TrainState.create(params=g.params, tx=g.tx, key=0)
    mesh = g.jax.make_mesh((4,), ("mine",))
    step = g.cotgrpo.jit_step(g.cotgrpo.make_sft_step(g.student, g.tx), mesh, axes={"mine": "fsdp"})
    state, metrics = step(state, g.batch)
    return metrics["loss"].mean()


def cotgrpo_resume(g: SimpleNamespace) -> Any:
    step = g.jax.jit(g.cotgrpo.make_sft_step(g.student, g.tx))
    state = g.cotgrpo.TrainState.create(params=g.params, tx=g.tx, key=0)
    state = step(step(state, g.batch)[0], g.batch)[0]
    with g.ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(g.folder / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(g.folder / "state", state)
    return [g.jax.device_get(step(step(s, g.batch)[0], g.batch)[0].params) for s in (state, restored)]


def setup_tunix(g: SimpleNamespace) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.distillation import distillation_trainer, strategies
    from tunix.sft import peft_trainer

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed, self.head = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

        def __call__(self, input_tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> Any:
            return self.head(jnp.tanh(self.embed(input_tokens))), None

    g.jax, g.jnp, g.nnx, g.tx, g.peft, g.distillation = jax, jnp, nnx, optax.adamw(1e-3), peft_trainer, strategies
    g.distiller = distillation_trainer
    g.model = lambda seed=0: Model(nnx.Rngs(seed))
    g.batch = peft_trainer.TrainingInput(input_tokens=IDS, input_mask=np.ones_like(IDS))
    g.inputs = lambda x: {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": np.tile(np.arange(T + 1), (B, 1)),
        "attention_mask": np.tril(np.ones((B, T + 1, T + 1), bool)),
    }


def tunix_sft(g: SimpleNamespace) -> Any:
    trainer = g.peft.PeftTrainer(g.model(), g.tx, g.peft.TrainingConfig(eval_every_n_steps=100))
    step, _ = trainer.with_gen_model_input_fn(g.inputs).jit_train_and_eval_step()
    loss, _, _ = step(g.batch)
    return loss


def tunix_tokens(g: SimpleNamespace) -> Any:
    forward = lambda model, input_tokens, input_mask: model(input_tokens, None, None, None)[0]
    labels = lambda input_tokens, input_mask: g.jax.nn.one_hot(input_tokens, V)
    strategy = g.distillation.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0)
    config = g.distiller.TrainingConfig(eval_every_n_steps=100)
    trainer = g.distiller.DistillationTrainer(g.model(), g.model(1), strategy, g.tx, config)
    step, _ = trainer.jit_train_and_eval_step()
    loss, _, _ = step(trainer._prepare_inputs(g.batch))
    return loss


def tunix_objective(g: SimpleNamespace) -> Any:
    def trusted(model: Any, input_tokens: Any, trust: Any) -> Any:
        log_p = g.jax.nn.log_softmax(model(input_tokens[:, :-1], None, None, None)[0])
        chosen = g.jnp.take_along_axis(log_p, input_tokens[:, 1:, None], axis=-1)[..., 0]
        return -g.jnp.mean(trust * chosen)

    trainer = g.peft.PeftTrainer(g.model(), g.tx, g.peft.TrainingConfig(eval_every_n_steps=100))
    trainer = trainer.with_loss_fn(trusted).with_gen_model_input_fn(lambda x: x)
    step, _ = trainer.jit_train_and_eval_step()
    loss, _, _ = step({"input_tokens": IDS, "trust": TRUST})
    return loss


def tunix_devices(g: SimpleNamespace) -> Any:
    mesh, P = g.jax.make_mesh((4,), ("mine",), axis_types=(g.jax.sharding.AxisType.Auto,)), g.jax.P
    with g.jax.set_mesh(mesh), mesh:
        model = g.model()
        g.nnx.update(model, g.jax.device_put(g.nnx.state(model), g.jax.NamedSharding(mesh, P())))
        config = g.peft.TrainingConfig(eval_every_n_steps=100, data_sharding_axis=("mine",))
        trainer = g.peft.PeftTrainer(model, g.tx, config).with_gen_model_input_fn(g.inputs)
        trainer.train([g.batch])
    return trainer.train_steps


def tunix_resume(g: SimpleNamespace) -> Any:
    def run(folder: Any, *stops: int) -> Any:
        for stop in stops:
            options = dict(eval_every_n_steps=100, max_steps=stop, checkpoint_root_directory=str(folder))
            trainer = g.peft.PeftTrainer(g.model(), g.tx, g.peft.TrainingConfig(**options))
            trainer.with_gen_model_input_fn(g.inputs).train([g.batch] * 4)
            trainer.close()
        return g.jax.device_get(g.nnx.state(trainer.model, g.nnx.Param))

    return run(g.folder / "a", 4), run(g.folder / "b", 2, 4)


def setup_trl(g: SimpleNamespace) -> None:
    import torch
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(V)}, unk_token="t0"))
    g.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t2")

    def model(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = dict(hidden_size=D, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, pad_token_id=1, eos_token_id=2, bos_token_id=None, **sizes))

    g.torch, g.trl, g.model = torch, trl, model
    ids = IDS.tolist()
    g.rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "trust": np.pad(TRUST, ((0, 0), (1, 0))).tolist()})
    g.prompts = Dataset.from_dict({"prompt": [f"t{row[0]}" for row in ids]})
    g.quiet = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, per_device_train_batch_size=B)


def trl_sft(g: SimpleNamespace) -> Any:
    args = g.trl.SFTConfig(g.folder, dataset_kwargs={"skip_prepare_dataset": True}, **g.quiet)
    trainer = g.trl.SFTTrainer(g.model(), args=args, train_dataset=g.rows, processing_class=g.tokenizer)
    optimizer = g.torch.optim.AdamW(trainer.model.parameters(), 1e-3)
    ids = g.torch.tensor(IDS).long()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": g.torch.ones_like(ids)}
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def trl_tokens(g: SimpleNamespace) -> Any:
    args = g.trl.DistillationConfig(g.folder, max_completion_length=T, max_steps=1, **g.quiet)
    student, rest = g.model(), dict(train_dataset=g.prompts, processing_class=g.tokenizer)
    optimizer = g.torch.optim.AdamW(student.parameters(), 1e-3)
    trainer = g.trl.DistillationTrainer(student, g.model(1), args=args, optimizers=(optimizer, None), **rest)
    return trainer.train().training_loss


def trl_objective(g: SimpleNamespace) -> Any:
    class Trusted(g.trl.SFTTrainer):  # type: ignore[name-defined]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            log_p = model(input_ids=inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
            chosen = log_p.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
            loss = -(inputs["trust"][:, 1:] * chosen).mean()
            return (loss, None) if return_outputs else loss

    collate = lambda rows: {name: g.torch.tensor([row[name] for row in rows]) for name in rows[0]}
    skip = {"skip_prepare_dataset": True}
    args = g.trl.SFTConfig(g.folder, max_steps=1, dataset_kwargs=skip, remove_unused_columns=False, **g.quiet)
    rest = dict(train_dataset=g.rows, processing_class=g.tokenizer, data_collator=collate)
    return Trusted(g.model(), args=args, **rest).train().training_loss


def trl_resume(g: SimpleNamespace) -> Any:
    def run(folder: Any, *stops: int) -> Any:
        for stop in stops:
            options = dict(dataset_kwargs={"skip_prepare_dataset": True}, lr_scheduler_type="constant", save_steps=2)
            args = g.trl.SFTConfig(folder, max_steps=stop, **options, **g.quiet)
            trainer = g.trl.SFTTrainer(g.model(), args=args, train_dataset=g.rows, processing_class=g.tokenizer)
            trainer.train(resume_from_checkpoint=stop != stops[0])
        return {name: x.numpy() for name, x in trainer.model.state_dict().items()}

    return run(g.folder / "a", 4), run(g.folder / "b", 2, 4)


def setup_rlax(g: SimpleNamespace) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    import rlax  # type: ignore[import-not-found]

    rng = np.random.default_rng(0)
    g.params = {"embed": rng.normal(size=(V, D)).astype("f"), "head": rng.normal(size=(D, V)).astype("f")}
    g.logits = lambda params, tokens: jnp.tanh(params["embed"][tokens]) @ params["head"]
    g.jax, g.jnp, g.optax, g.rlax, g.tx = jax, jnp, optax, rlax, optax.adamw(1e-3)
    g.teacher, g.ones = jax.tree.map(lambda x: jnp.asarray(x[::-1]), g.params), np.ones((B, T), np.float32)


def rlax_sft(g: SimpleNamespace) -> Any:
    def loss_of(params: Any, ids: Any) -> Any:
        losses = g.jax.vmap(g.rlax.policy_gradient_loss)(g.logits(params, ids[:, :-1]), ids[:, 1:], g.ones, g.ones)
        return g.jnp.mean(losses)

    @g.jax.jit
    def step(params: Any, opt_state: Any, ids: Any) -> Any:
        loss, grads = g.jax.value_and_grad(loss_of)(params, ids)
        updates, opt_state = g.tx.update(grads, opt_state, params)
        return g.optax.apply_updates(params, updates), opt_state, loss

    _params, _opt_state, loss = step(g.params, g.tx.init(g.params), IDS)
    return loss


def rlax_tokens(g: SimpleNamespace) -> Any:
    def loss_of(params: Any, ids: Any) -> Any:
        own, teacher = g.logits(params, ids[:, :-1]), g.logits(g.teacher, ids[:, :-1])
        return g.jnp.mean(g.rlax.categorical_kl_divergence(own, teacher))

    @g.jax.jit
    def step(params: Any, opt_state: Any, ids: Any) -> Any:
        loss, grads = g.jax.value_and_grad(loss_of)(params, ids)
        updates, opt_state = g.tx.update(grads, opt_state, params)
        return g.optax.apply_updates(params, updates), opt_state, loss

    _params, _opt_state, loss = step(g.params, g.tx.init(g.params), IDS)
    return loss


def rlax_objective(g: SimpleNamespace) -> Any:
    def loss_of(params: Any, ids: Any, trust: Any) -> Any:
        losses = g.jax.vmap(g.rlax.policy_gradient_loss)(g.logits(params, ids[:, :-1]), ids[:, 1:], trust, g.ones)
        return g.jnp.mean(losses)

    @g.jax.jit
    def step(params: Any, opt_state: Any, ids: Any, trust: Any) -> Any:
        loss, grads = g.jax.value_and_grad(loss_of)(params, ids, trust)
        updates, opt_state = g.tx.update(grads, opt_state, params)
        return g.optax.apply_updates(params, updates), opt_state, loss

    _params, _opt_state, loss = step(g.params, g.tx.init(g.params), IDS, TRUST)
    return loss


def setup_tinker(g: SimpleNamespace) -> None:
    raise SystemExit("tinker needs its service: these functions follow its documentation and were not run.")


def tinker_sft(g: SimpleNamespace) -> Any:
    future = g.client.forward_backward(g.data, "cross_entropy")
    g.client.optim_step(g.types.AdamParams(learning_rate=1e-3))
    return future.result()


def tinker_tokens(g: SimpleNamespace) -> Any:
    for datum, sampled in zip(g.data, g.sampled_log_probs, strict=True):
        judged = np.array(g.teacher.compute_logprobs(datum.model_input).result()[1:])
        fields = {"target_tokens": datum.targets, "logprobs": sampled, "advantages": judged - sampled}
        datum.loss_fn_inputs = {name: g.types.TensorData.from_numpy(array) for name, array in fields.items()}
    future = g.client.forward_backward(g.data, "importance_sampling")
    g.client.optim_step(g.types.AdamParams(learning_rate=1e-3))
    return future.result()


def tinker_objective(g: SimpleNamespace) -> Any:
    def trusted(data: Any, log_probs: Any) -> Any:
        loss = -sum(
            (datum.loss_fn_inputs["trust"].to_torch() * p).sum() for datum, p in zip(data, log_probs, strict=True)
        )
        return loss, {"loss": loss.item()}

    future = g.client.forward_backward_custom(g.data, trusted)
    g.client.optim_step(g.types.AdamParams(learning_rate=1e-3))
    return future.result()


def tinker_resume(g: SimpleNamespace) -> Any:
    path = g.client.save_state("two").result().path
    return g.service.create_training_client_from_state_with_optimizer(path).result()


def lines_of(function: Any) -> int:
    """Return the number of lines of a function's body, without blank ones and comments."""
    source = inspect.getsource(function)
    first = ast.parse(source).body[0].body[0].lineno  # type: ignore[attr-defined]
    body = [line.strip() for line in source.splitlines()[first - 1 :]]
    return sum(bool(line) and not line.startswith("#") for line in body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of lines, or run one library's tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", nargs="?", choices=PEERS, help="run the tasks of this library; without it: the table")
    peer = parser.parse_args(arguments).peer
    if peer is None:
        print("| | " + " | ".join(TASKS) + " |\n|---" + "|---:" * len(TASKS) + "|")
        for peer in PEERS:
            found = [globals().get(f"{peer}_{task}") for task in TASKS]
            print(f"| {peer} | " + " | ".join("-" if f is None else str(lines_of(f)) for f in found) + " |")
        return
    print(peer, version(PEERS[peer]))
    for task in TASKS:
        function = globals().get(f"{peer}_{task}")
        if function is None:
            print(f"{task}: nothing to run")
            continue
        with tempfile.TemporaryDirectory() as folder:
            g = SimpleNamespace(folder=Path(folder))
            globals()[f"setup_{peer}"](g)
            result = function(g)
        if task == "resume":
            import jax

            equal = jax.tree.map(np.array_equal, *result)
            print(f"{task}: {'equal to the bit' if all(jax.tree.leaves(equal)) else 'NOT equal'}")
        else:
            print(f"{task}: {float(result):.4f}")


if __name__ == "__main__":
    main()
