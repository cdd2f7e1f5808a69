"""What the short help of a command shows: the settings that matter most, a line each, and examples."""

from __future__ import annotations

LINES = {
    "config": "YAML file; options after it override it",
    "run_dir": "folder of the run, new or resumed",
    "seed": "seed of weights, data order and draws",
    "student.path": "folder or hub id; null: scratch",
    "student.width": "width of the student",
    "student.num_layers": "layers of the student",
    "student.dtype": "float32 or bfloat16",
    "student.remat": "recompute for memory: none, dots, full, ...",
    "data.train": "rows: files, folders or hub ids",
    "data.test": "held-out rows; empty: some of train's",
    "data.columns": "your column names, as {question: q}",
    "data.format": "plain or chat (the model's template)",
    "data.seq_len": "tokens of a packed row",
    "data.loss_on": "learn sequence or completion",
    "lora.rank": "rank of LoRA adapters; 0: train all",
    "sft.steps": "number of updates",
    "sft.epochs": "passes over rows, instead of steps",
    "sft.batch_size": "rows of a batch",
    "sft.micro_batches": "parts of a batch, for less memory",
    "sft.optimizer.learning_rate": "peak learning rate",
    "sft.eval_every": "steps between held-out losses",
    "grpo.steps": "number of updates",
    "grpo.batch_size": "rows of a batch, or replies on-policy",
    "grpo.micro_batches": "parts of a batch, for less memory",
    "grpo.init_from": "start stage; null: the run's sft",
    "grpo.optimizer.learning_rate": "peak learning rate",
    "grpo.eval_every": "steps between held-out losses",
    "grpo.ghosts.source": "source of the ghost tokens",
    "grpo.ghosts.teacher": "model of source teacher_model",
    "grpo.ghosts.prompts": "questions for on-policy replies",
    "grpo.ghosts.max_new_tokens": "longest reply in training",
    "grpo.objective.name": "pair, nll, forward_kl, own, ...",
    "grpo.objective.beta": "sharpness of pair",
    "grpo.reference_kl": "weight of the KL to the first student",
    "eval.rows": "most rows of each test set",
    "eval.batch_size": "replies decoded at a time",
    "eval.max_new_tokens": "longest reply in tokens",
    "eval.sets": "more test sets, as {name: file}",
    "eval.samples": "drawn replies a question, for pass@k",
    "eval.k": "the k of pass@k and maj@k",
    "eval.temperature": "temperature of drawn replies",
    "eval.top_p": "nucleus of drawn replies",
    "eval.seed": "seed of drawn replies",
    "trackers": "wandb, mlflow or trackio, one or several",
    "mesh.data": "devices that split the batch",
    "mesh.fsdp": "devices that share the weights",
    "mesh.tensor": "devices that split the layers",
    "questions": "questions to ask: files, folders, hub ids",
    "columns": "your column names, as {question: q}",
    "out": "folder that it writes",
    "max_questions": "ask the first questions only; 0: all",
    "candidates": "replies to each question",
    "top_logprobs": "likeliest tokens to keep of each; 0: none",
    "format": "format of the triples: jsonl or parquet",
    "teacher.base_url": "address of an OpenAI-compatible server",
    "teacher.model": "the teacher's name at the server",
    "teacher.api_key_env": "variable that holds the key",
    "teacher.path": "model folder or hub id, run here",
    "teacher.temperature": "sampling temperature; null: the server's",
    "teacher.max_tokens": "longest reply in tokens",
    "teacher.concurrency": "requests at a time",
    "teacher.batch": "use the batch API: cheaper, up to a day",
    "verify.without_gold": "no right answer known: error, majority ...",
    "verify.keep": "right replies to keep: all, shortest ...",
    "verify.test_sets": "drop what shares n-grams with these",
    "model": "model to measure, instead of a run",
    "topology": "chips: v5e:4x4, v5p:2x2x1, h100:8, ...",
    "stage": "stage to plan: sft or grpo",
    "search": "rank meshes, remat policies, micro-batches",
    "language": "language of the task: en or zh",
}
"""A short line on each setting. It leaves out what only `--help-all` says."""

NEEDED = {
    "sft": ("data.train",),
    "grpo": ("data.train",),
    "generate": ("questions",),
    "plan": ("topology",),
}
"""Settings that a command does not run without."""

_STUDENT = ("student.path", "data.train", "data.test", "data.columns", "data.format", "data.seq_len")
MATTER_MOST: dict[str, tuple[str, ...]] = {
    "quickstart": (
        *("out", "language", "seed", "data.train", "student.width", "student.num_layers", "sft.steps"),
        *("sft.optimizer.learning_rate", "grpo.steps", "grpo.optimizer.learning_rate", "eval.rows"),
    ),
    "generate": (
        *("config", "questions", "columns", "max_questions", "out", "format", "teacher.base_url", "teacher.model"),
        *("teacher.api_key_env", "teacher.path", "teacher.temperature", "teacher.max_tokens", "teacher.concurrency"),
        *("teacher.batch", "candidates", "top_logprobs", "verify.without_gold", "verify.keep", "verify.test_sets"),
    ),
    "sft": (
        *("config", "run_dir", *_STUDENT, "data.loss_on", "lora.rank", "sft.steps", "sft.epochs", "sft.batch_size"),
        *("sft.micro_batches", "sft.optimizer.learning_rate", "sft.eval_every", "eval.max_new_tokens"),
        *("student.dtype", "trackers", "mesh.fsdp"),
    ),
    "grpo": (
        *("config", "run_dir", "data.train", "data.test", "grpo.init_from", "grpo.ghosts.source"),
        *("grpo.ghosts.teacher", "grpo.ghosts.prompts", "grpo.ghosts.max_new_tokens", "grpo.objective.name"),
        *("grpo.objective.beta", "grpo.reference_kl", "grpo.steps", "grpo.batch_size", "grpo.micro_batches"),
        *("grpo.optimizer.learning_rate", "grpo.eval_every", "lora.rank", "trackers", "mesh.fsdp"),
    ),
    "eval": (
        *("config", "run_dir", "model", "out", "data.test", "data.columns", "data.format", "eval.rows", "eval.sets"),
        *("eval.batch_size", "eval.max_new_tokens", "eval.samples", "eval.k", "eval.temperature", "eval.top_p"),
        *("eval.seed", "student.dtype"),
    ),
    "plan": (
        *("config", "topology", "stage", "search", "out", "student.path", "student.dtype", "student.remat"),
        *("data.seq_len", "sft.batch_size", "grpo.batch_size", "grpo.micro_batches", "grpo.ghosts.source"),
        *("lora.rank", "mesh.data", "mesh.fsdp", "mesh.tensor"),
    ),
}
"""By command, in the order in which the help shows them. A command without an entry has few options: all are shown."""

LINES_OF_COMMANDS = {
    ("eval", "out"): "with --model, folder for eval.json",
    ("eval", "run_dir"): "the run whose newest student is measured",
    ("plan", "out"): "file for the plan, FILE.json",
    ("quickstart", "data.train"): "your own rows; empty: column addition",
    ("quickstart", "sft.steps"): "updates of SFT",
    ("quickstart", "grpo.steps"): "updates of each GRPO stage",
}
"""Lines that differ from those of `LINES`, by command and setting."""

_HUB = "--student.path HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("cotgrpo quickstart --out my_first_run",),
    "generate": (
        "cotgrpo generate --questions questions.jsonl --out ghosts \\\n"
        "    --teacher.base_url http://localhost:8000/v1 --teacher.model Qwen/Qwen3-8B",
    ),
    "gold": (
        "cotgrpo gold --student runs/first/sft/eval.json --ghosts train.jsonl \\\n    --out edit.jsonl",
        "cotgrpo gold --edited edit.jsonl --out gold.jsonl",
    ),
    "sft": (
        f"cotgrpo sft --data.train train.jsonl --run_dir runs/first \\\n    {_HUB} \\\n"
        "    --data.format chat --sft.epochs 2",
    ),
    "grpo": (
        "cotgrpo grpo --config runs/first/sft/config.yaml \\\n"
        "    --grpo.ghosts.source privileged_self --grpo.steps 100",
    ),
    "eval": (
        "cotgrpo eval --run_dir runs/first",
        "cotgrpo eval --model Qwen/Qwen3-0.6B --data.test test.jsonl --out qwen3",
    ),
    "compare": ("cotgrpo compare runs/first runs/second --out compare.html",),
    "plan": ("cotgrpo plan --config configs/llama3_8b_v5p32.yaml --topology v5p:2x2x4",),
    "export": ("cotgrpo export --run_dir runs/first --out student",),
    "bench": ("cotgrpo bench step --shape 16m",),
}

NAMES_ELSEWHERE = {
    "model": "student.path",
    "model_name": "student.path",
    "model_name_or_path": "student.path",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "output_dir": "run_dir",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "lr": "{stage}.optimizer.learning_rate",
    "max_steps": "{stage}.steps",
    "num_train_epochs": "{stage}.epochs",
    "per_device_train_batch_size": "{stage}.batch_size",
    "gradient_accumulation_steps": "{stage}.micro_batches",
    "eval_steps": "{stage}.eval_every",
    "save_steps": "checkpoint.every",
    "logging_steps": "{stage}.log_every",
    "report_to": "trackers",
    "max_completion_length": "grpo.ghosts.max_new_tokens",
    "num_generations": "grpo.ghosts.num_generations",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.rslora",
    "load_in_4bit": "lora.quantize_base",
    "load_in_8bit": "lora.quantize_base",
    "bnb_4bit_quant_type": "lora.quantize_base",
}
"""What other libraries call our settings, to suggest ours. `{stage}` is the command's."""
