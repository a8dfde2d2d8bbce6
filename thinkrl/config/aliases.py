"""TRL's and verl's names for the options of train.py, for error messages and the table in docs/options.md."""

from __future__ import annotations

# A row: our option, TRL's names (GRPOConfig), verl's names (the end of a dotted path).
ELSEWHERE: list[tuple[str, str, str]] = [
    ("--model", "model_name_or_path", "model.path"),
    ("--data", "dataset_name", "data.train_files"),
    ("--eval_data", "", "data.val_files"),
    ("--name", "run_name", "trainer.experiment_name"),
    ("--runs_dir", "output_dir", "trainer.default_local_dir"),
    ("--resume", "resume_from_checkpoint", "trainer.resume_mode"),
    ("--wandb, --tensorboard", "report_to", "trainer.logger"),
    ("--save_every", "save_steps", "trainer.save_freq"),
    ("--keep_checkpoints", "save_total_limit", "trainer.max_actor_ckpt_to_keep"),
    ("--push_to_hub owner/name", "hub_model_id", ""),
    ("--keep_optimizer", "save_only_model false", "checkpoint.save_contents"),
    ("--eval_every", "eval_steps", "trainer.test_freq"),
    ("--eval_samples", "num_generations_eval", "val_kwargs.n"),
    ("--log_groups", "log_completions, num_completions_to_print", "trainer.rollout_data_dir"),
    ("--dtype bfloat16", "bf16", "rollout.dtype"),
    (
        "--problems_per_step, the problems of one optimizer step over all ranks",
        "per_device_train_batch_size, gradient_accumulation_steps, generation_batch_size",
        "data.train_batch_size, ppo_mini_batch_size",
    ),
    ("--group_size", "num_generations", "rollout.n"),
    ("--max_tokens", "max_completion_length", "data.max_response_length, rollout.response_length"),
    ("--kv_pages", "vllm_gpu_memory_utilization", "rollout.gpu_memory_utilization"),
    ("--clip_low", "epsilon", "clip_ratio_low"),
    ("--clip_high", "epsilon_high", "clip_ratio_high"),
    ("--clip_low and --clip_high", "", "clip_ratio"),
    ("--kl_coef", "beta", "kl_loss_coef"),
    (
        "--aggregate token / sequence / constant, --surrogate cispo / sapo",
        "loss_type dapo / grpo / dr_grpo / cispo / sapo",
        "loss_agg_mode token-mean / seq-mean-token-mean / seq-mean-token-sum-norm",
    ),
    (
        "--level sequence, --surrogate cispo / sapo / dppo",
        "importance_sampling_level sequence",
        "policy_loss.loss_mode gspo / cispo / sapo / dppo_tv",
    ),
    ("--dynamic_sampling, rounds", "", "filter_groups.enable, filter_groups.max_num_gen_batches"),
    ("--length overlong", "", "overlong_buffer.enable"),
    ("--length_cache, of --length overlong", "", "overlong_buffer.len"),
    ("--importance_low", "vllm_importance_sampling_clip_min", ""),
    ("--advantage_std none", "scale_rewards none", "norm_adv_by_std_in_grpo False"),
    (
        "--importance_cap",
        "vllm_importance_sampling_cap, vllm_importance_sampling_clip_max",
        "rollout_is_threshold",
    ),
    ("--updates_per_rollout", "num_iterations", "ppo_epochs"),
    ("--steps", "max_steps, num_train_epochs", "trainer.total_training_steps, trainer.total_epochs"),
    ("--lr", "learning_rate", "optim.lr"),
    ("--schedule", "lr_scheduler_type", "optim.lr_scheduler_type"),
    (
        "--warmup, a share of the steps",
        "warmup_ratio, warmup_steps",
        "optim.lr_warmup_steps_ratio, optim.lr_warmup_steps",
    ),
    ("--beta1", "adam_beta1", ""),
    ("--beta2", "adam_beta2", ""),
    ("--max_grad_norm", "", "optim.clip_grad"),
    ("--micro_batch_tokens", "", "ppo_max_token_len_per_gpu, ppo_micro_batch_size_per_gpu"),
    ("--activation_checkpointing", "gradient_checkpointing", "enable_gradient_checkpointing"),
    ("--system", "system_prompt", ""),
]
FULL_DISTRIBUTION = (
    ": training samples from the whole distribution, because the log-probs of a truncated one are not the "
    "policy's; use --temperature"
)
REFUSED = dict.fromkeys(("top_p", "top_k", "min_p"), FULL_DISTRIBUTION)


def elsewhere(name: str) -> str:
    """Hint for an unknown option, such as ": TRL's num_generations is --group_size here", or ""."""
    if name in REFUSED:
        return REFUSED[name]
    for here, *theirs in ELSEWHERE:
        for library, names in zip(("TRL", "verl"), theirs):
            for full in filter(None, names.split(", ")):
                path = full.split()[0]
                if f".{name}".endswith(f".{path}") or name in (path.replace(".", "_"), path.split(".")[-1]):
                    return f": {library}'s {full} is {here} here"
    return ""
