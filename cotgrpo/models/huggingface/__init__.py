"""Models in Hugging Face's formats: config.json, safetensors, adapters of `peft`, model cards."""
