"""What TRL and verl call things, in which unit, and what that is here.

One table serves the guides (docs/guides, `tools/peer_tables.py` writes it there), the command line and `Trainer(...)`: a
name or a value of theirs that is typed for one of ours is answered with its row. Names are those of TRL 1.16.0
(GRPOConfig, RLOOConfig, ModelConfig, and the arguments of GRPOTrainer) and verl 0.9.1 (ppo_trainer.yaml). No imports: it is read before anything is loaded.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Row(NamedTuple):
    """One or more names of a peer that have one answer."""

    peer: str
    names: str  # separated by blanks; with * for what is alike
    unit: str  # what its number counts, or which values it has
    ours: str  # keys, or keys and values, separated by blanks; "" where there is none
    note: str

    def fits(self, typed: str) -> int:
        """2: it is one of the names, whole or without its first parts; 1: it is alike; 0: neither."""
        names = self.names.split()
        if any(typed == name or name.endswith(f".{typed}") for name in names):
            return 2
        return int(any(fnmatchcase(typed, name) for name in names))

    @property
    def key(self) -> str:
        """The first of our keys, without a value."""
        return self.ours.split(" ")[0].partition("=")[0]

    def answer(self) -> str:
        """The row in words."""
        there = f"{self.peer}'s, {self.unit}" if self.unit else f"{self.peer}'s"
        here = f"here {' '.join(self.ours.split())}" if self.ours else "there is no such key here"
        return f"{there}: {here}" + (f"; {self.note}" if self.note else "")


_RANKS = "torchrun starts one process a GPU (docs/scaling.md)"
_SERVER = "an option of the server: in the command that starts it (docs/scaling.md); the embedded engine needs none"
_TEXT = "text in, text out: no images, tools or environments"

# fmt: off
TRL: tuple[Row, ...] = tuple(Row("TRL", *row) for row in (
    # the batch
    ("num_generations", "completions a prompt (8)", "num_generations", "1 by default; 1 needs an advantage that compares with nothing or with the past"),
    ("per_device_train_batch_size", "completions of a forward pass, a device", "batch_size", "counts queries of a whole round: generation_batch_size / num_generations; memory is cut by tokens_per_microbatch"),
    ("gradient_accumulation_steps", "forward passes an optimizer step", "tokens_per_microbatch", "batch_size is the whole round's queries, cut into micro-batches of so many tokens by itself: the gradient does not depend on it"),
    ("generation_batch_size", "completions drawn together, all devices", "batch_size num_generations", "batch_size x num_generations"),
    ("steps_per_generation", "forward passes a generation batch is cut into", "update.minibatches", "optimizer steps of one pass over a round: steps_per_generation / gradient_accumulation_steps"),
    ("num_iterations", "passes over drawn completions", "update.epochs", ""),
    ("max_steps", "optimizer steps", "max_rounds", "counts rounds, of update.epochs x update.minibatches optimizer steps each"),
    ("num_train_epochs", "passes over the prompts", "num_train_epochs", "ends the run if it comes before max_rounds"),
    ("num_generations_eval", "completions a prompt", "evaluation.num_samples", ""),
    ("per_device_eval_batch_size", "completions of a forward pass, a device", "rollout.batch_size", "sequences decoded together"),
    ("shuffle_dataset train_sampling_strategy", "", "seed", "prompts are shuffled anew each epoch, by the seed"),
    # the objective
    ("loss_type", "dapo (default), grpo, bnpo, dr_grpo, cispo, luspo, sapo, vespo", "objective.kind objective.aggregation", "dapo and bnpo: ppo, token-mean; grpo: ppo, seq-mean-token-mean; dr_grpo: ppo, seq-mean-token-sum-norm; luspo: gspo, seq-mean-token-sum; cispo: importance with its cap; sapo and vespo are not here"),
    ("importance_sampling_level", "token or sequence", "objective.kind=gspo", "for sequence; token is every other kind"),
    ("epsilon", "", "objective.clip_low", ""),
    ("epsilon_high", "null: epsilon; for cispo the cap itself", "objective.clip_high", "0.2 by default, whatever clip_low is; for cispo objective.kind=importance objective.importance_cap"),
    ("delta", "upper bound of the ratio", "objective.dual_clip", "the same from 1 + clip_high on; below, TRL's bounds positive advantages instead"),
    ("beta", "factor of the KL", "objective.kl_coef objective.kl=k3", "both are needed; TRL multiplies its KL by the ratio unless use_bias_correction_kl is off"),
    ("use_bias_correction_kl", "true (default): the KL times the ratio", "", "the KL is the estimator itself, as with false"),
    ("entropy_coef", "mean entropy of the tokens", "objective.entropy_coef", "here it follows the aggregation"),
    ("use_adaptive_entropy entropy_coef_* entropy_target", "", "", "the entropy's coefficient is constant"),
    ("scale_rewards", "group (default), batch, none", "advantage=group_norm", "group_norm is group, group_mean_batch_std is batch, group_mean is none (dr_grpo as published)"),
    ("normalize_advantages", "RLOO: over the batch", "advantage=rloo", "not normalized; batch_norm is, without leaving one out"),
    ("reward_clip_range", "RLOO", "", "clip in the reward function"),
    ("reward_weights", "a factor a reward function", "reward.weights", ""),
    ("reward_funcs", "functions, or names", "reward.functions", "names or module.py:function"),
    ("multi_objective_aggregation", "sum_then_normalize, normalize_then_sum", "", "rewards are summed, then compared"),
    ("mask_truncated_completions", "", "rollout.mask_truncated", "here such a completion leaves the normalizer, too"),
    ("top_entropy_quantile", "share of tokens", "", "every token counts"),
    ("off_policy_mask_threshold", "nats a token", "", "replay.correction bounds what old rollouts weigh"),
    ("sapo_temperature_* vespo_*", "", "", "sapo and vespo are not here"),
    ("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", "", "", "the reference is the initial model"),
    ("router_aux_loss_coef", "", "", "experts' routers get no loss of their own"),
    # drawing
    ("temperature", "", "temperature", "of drawing and of the update, as there"),
    ("top_p", "", "rollout.top_p", ""),
    ("top_k", "0: all", "rollout.top_k", ""),
    ("min_p", "", "rollout.min_p", ""),
    ("repetition_penalty generation_kwargs cache_implementation", "", "", "a draw is from the tempered softmax and its filters alone"),
    ("max_completion_length", "tokens (512)", "max_completion_length", "1024 by default"),
    ("max_prompt_length", "tokens, cut off on the left", "max_prompt_length", "longer prompts are left out and counted"),
    ("chat_template_kwargs", "", "chat_template_kwargs", "of the run, not of a row"),
    ("use_vllm", "", "rollout.engine=vllm", "with rollout.urls or rollout.server_python (docs/scaling.md)"),
    ("vllm_mode", "colocate (default), server", "rollout.urls rollout.server_python", "servers that run already, or one that the run starts, in a process of its own; there is no colocate: the embedded engine shares the weights' memory"),
    ("vllm_server_base_url vllm_server_host vllm_server_port", "one address", "rollout.urls", "http://host:port, one or more"),
    ("vllm_server_timeout", "seconds to wait for the server (240)", "rollout.retry_s", "600 by default; for one answer rollout.request_timeout_s"),
    ("vllm_group_port", "port of the weights' transfer", "rollout.push", "auto, folder, lora or nccl; ports are chosen by themselves"),
    ("vllm_importance_sampling_*", "correction on by default; clip_max 3", "rollout.on_logprob_gap=correct objective.importance_cap", "stop by default; correct takes ratios to the sampler past rollout.max_logprob_gap, objective.kind=importance or importance_mask truncates or masks them by token"),
    ("vllm_*", "", "rollout.server_command", _SERVER),
    ("use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged ds3_gather_for_generation", "", "", "the embedded engine draws, or vLLM servers do (rollout.engine)"),
    ("max_tool_calling_iterations log_multimodal tools rollout_func environment_factory", "", "", _TEXT),
    # the optimizer
    ("learning_rate", "", "learning_rate", ""),
    ("lr_scheduler_type", "linear by default", "lr_scheduler_type", "constant by default; also linear and cosine"),
    ("lr_scheduler_kwargs", "", "min_lr_ratio", ""),
    ("warmup_steps", "optimizer steps; below 1 a share", "warmup_rounds", "counts rounds; warmup_ratio is a share"),
    ("warmup_ratio", "share of the optimizer steps", "warmup_ratio", "share of the rounds"),
    ("weight_decay", "", "weight_decay", "0.01 by default, 0 there"),
    ("adam_beta1 adam_beta2 adam_epsilon", "", "adam_beta1 adam_beta2 adam_epsilon", ""),
    ("max_grad_norm", "", "max_grad_norm", ""),
    ("optim optim_*", "", "", "AdamW alone"),
    ("bf16 fp16 dtype torch_dtype tf32", "of the computation, or of the weights", "dtype", "of the weights; bfloat16 keeps float32 master weights"),
    ("cast_lm_head_to_fp32", "", "", "logits are computed in float32 from the head as it is"),
    ("gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs", "on by default", "gradient_checkpointing", "off by default"),
    ("disable_dropout", "", "", "there never is dropout: sampler and trainer are one policy"),
    ("use_liger_kernel liger_kernel_config torch_compile torch_compile_*", "", "", "the head is fused in any case"),
    ("neftune_noise_alpha label_smoothing_factor", "", "", ""),
    # the model and its adapters
    ("model_name_or_path", "", "model_name_or_path", ""),
    ("model_revision hub_revision", "", "", "give a local folder"),
    ("model_init_kwargs attn_implementation use_cache", "", "", "attention is chosen and checked by itself (docs/models.md)"),
    ("trust_remote_code", "", "", "code that comes with a model is never run"),
    ("use_peft", "", "lora.rank", "adapters where it is above 0"),
    ("lora_r", "", "lora.rank", ""),
    ("lora_alpha", "", "lora.alpha", ""),
    ("lora_dropout", "", "lora.dropout", "must be 0"),
    ("lora_target_modules", "", "lora.targets", ""),
    ("lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora", "", "", "plain LoRA on linear modules, never on the head"),
    ("load_in_8bit load_in_4bit bnb_4bit_* use_bnb_nested_quant", "", "", "weights are not quantized"),
    # data
    ("dataset_name", "a hub name", "task", "a task's name, or a data set's: hub name, folder or file"),
    ("train_dataset eval_dataset dataset_config dataset_train_split dataset_test_split dataset_streaming", "", "task task_options", ""),
    ("remove_unused_columns label_names length_column_name include_for_metrics ignore_bias_buffers", "", "", "every column goes to the reward functions"),
    ("dataloader_* data_seed ignore_data_skip pad_to_multiple_of", "", "seed", "one seed for the order of prompts and for draws; nothing is padded"),
    # the run
    ("output_dir", "", "output_dir", ""),
    ("seed", "", "seed", ""),
    ("report_to", "", "report_to", "metrics.jsonl is written in any case"),
    ("run_name project trackio_*", "", "", "trackers get the run folder's name"),
    ("save_steps", "optimizer steps", "save_steps", "counts rounds"),
    ("save_strategy save_only_model save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint", "", "save_steps", "a checkpoint has everything that goes on needs"),
    ("save_total_limit", "", "save_total_limit", ""),
    ("eval_steps", "optimizer steps", "eval_steps", "counts rounds"),
    ("eval_strategy eval_on_start eval_delay do_train do_eval do_predict", "", "eval_steps", "before, every so many rounds, and after"),
    ("eval_accumulation_steps eval_do_concat_batches eval_use_gather_object prediction_loss_only batch_eval_metrics bf16_full_eval fp16_full_eval", "", "", ""),
    ("load_best_model_at_end metric_for_best_model greater_is_better", "", "", "evaluate the checkpoints that are kept"),
    ("resume_from_checkpoint", "", "resume", "auto by default: a run folder is continued"),
    ("logging_steps logging_first_step logging_strategy logging_nan_inf_filter", "optimizer steps", "", "every round is a line of metrics.jsonl"),
    ("logging_dir", "", "output_dir", ""),
    ("log_completions num_completions_to_print log_unique_prompts", "", "log_rollouts_steps", "rounds between saved rollouts (Parquet); the report shows them"),
    ("log_level log_level_replica log_on_each_node disable_tqdm debug", "", "", "--quiet prints warnings and errors alone"),
    ("include_num_input_tokens_seen skip_memory_metrics average_tokens_across_devices", "", "", "tokens and seconds are always logged"),
    ("push_to_hub hub_* log_completions_hub_repo", "", "", "checkpoints are Hugging Face folders: upload them as they are"),
    ("use_cpu", "", "device=cpu", ""),
    ("fsdp fsdp_config", "", "distributed.shard", f"fsdp (the default) or ddp; {_RANKS}"),
    ("ddp_timeout", "seconds (1800)", "distributed.timeout_s", "3600 by default"),
    ("ddp_*", "", "distributed.shard=ddp", f"its other options are not here; {_RANKS}"),
    ("deepspeed accelerator_config parallelism_config", "", "distributed.shard", f"fsdp or ddp, of torch itself; {_RANKS}"),
    ("local_rank", "", "", _RANKS),
    ("auto_find_batch_size torch_empty_cache_steps", "", "tokens_per_microbatch", ""),
    ("full_determinism", "", "", "always: the same settings give the same bits"),
    # arguments of GRPOTrainer
    ("args", "a GRPOConfig", "", "its fields are keywords of Trainer, by the names of this table: Trainer(..., learning_rate=1e-5); or a Config as config="),
    ("processing_class", "a tokenizer", "", "Trainer's tokenizer=, of a model in memory; a model that is named brings its own"),
    ("callbacks", "a list of TrainerCallback", "", "Trainer's listener=, one bandit_rft.Listener; Listeners joins several"),
    ("peft_config", "a LoraConfig", "lora.rank lora.alpha lora.targets", "Trainer(..., lora={'rank': 16})"),
    ("reward_processing_classes", "", "", "rewards are functions: a model among them brings its own tokenizer"),
    ("optimizers", "", "", "AdamW alone"),
    ("quantization_config", "", "", "weights are not quantized"),
))
VERL: tuple[Row, ...] = tuple(Row("verl", *row) for row in (
    # the batch
    ("data.train_batch_size", "prompts a step (1024)", "batch_size", "queries a round: the same count"),
    ("actor_rollout_ref.rollout.n", "responses a prompt", "num_generations", ""),
    ("actor_rollout_ref.actor.ppo_mini_batch_size", "prompts an optimizer step", "update.minibatches", "parts of a round: train_batch_size / ppo_mini_batch_size"),
    ("actor_rollout_ref.actor.ppo_epochs", "passes over drawn responses", "update.epochs", ""),
    ("actor_rollout_ref.actor.ppo_micro_batch_size actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "responses of a forward pass, a GPU", "tokens_per_microbatch", "micro-batches are cut by tokens; the gradient does not depend on it"),
    ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu actor_rollout_ref.actor.use_dynamic_bsz", "tokens of a forward pass, a GPU", "tokens_per_microbatch", ""),
    ("actor_rollout_ref.*.log_prob_*", "of scoring", "tokens_per_microbatch", "the sampler's log-probabilities are the old ones: nothing is scored again"),
    ("data.gen_batch_size", "prompts drawn at a time", "rollout.dynamic_sampling", "replaces queries of constant reward"),
    ("data.val_batch_size", "prompts", "rollout.batch_size", "sequences decoded together"),
    ("trainer.total_epochs", "passes over the prompts", "num_train_epochs", ""),
    ("trainer.total_training_steps actor_rollout_ref.actor.optim.total_training_steps", "steps of data.train_batch_size prompts", "max_rounds", "a round is such a step"),
    # the objective
    ("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla (default), gspo, cispo, gpg, ...", "objective.kind", "vanilla: ppo with dual_clip=3; gpg: reinforce; the others here are gspo and cispo"),
    ("actor_rollout_ref.actor.policy_loss.*", "", "", "clip_cov, kl_cov and dro are not here"),
    ("actor_rollout_ref.actor.clip_ratio", "both bounds", "objective.clip_low objective.clip_high", ""),
    ("actor_rollout_ref.actor.clip_ratio_low", "", "objective.clip_low", "at most 1: a ratio is above 0"),
    ("actor_rollout_ref.actor.clip_ratio_high", "", "objective.clip_high", ""),
    ("actor_rollout_ref.actor.clip_ratio_c", "3 by default", "objective.dual_clip", "none by default; 3 in the presets"),
    ("actor_rollout_ref.actor.loss_agg_mode", "", "objective.aggregation", "the same names, but for token-sum"),
    ("actor_rollout_ref.actor.loss_scale_factor", "tokens; null: the longest response allowed", "objective.norm_length", ""),
    ("actor_rollout_ref.actor.entropy_coeff", "", "objective.entropy_coef", ""),
    ("actor_rollout_ref.actor.use_kl_loss", "", "kl.where=loss", "with objective.kl and objective.kl_coef"),
    ("actor_rollout_ref.actor.kl_loss_coef", "", "objective.kl_coef", ""),
    ("actor_rollout_ref.actor.kl_loss_type", "low_var_kl (default), kl, mse, abs, full", "objective.kl", "low_var_kl is k3, kl is k1, mse is k2"),
    ("actor_rollout_ref.actor.tau_pos actor_rollout_ref.actor.tau_neg", "", "", "sapo is not here"),
    ("actor_rollout_ref.actor.calculate_*", "", "", "the entropy is always logged"),
    ("algorithm.adv_estimator", "gae (default), grpo, rloo, reinforce_plus_plus, ...", "advantage", "grpo: group_norm; rloo: rloo; reinforce_plus_plus: batch_norm; gae needs a critic, of which there is none"),
    ("algorithm.norm_adv_by_std_in_grpo", "false: Dr. GRPO", "advantage=group_mean", "for false; group_norm for true"),
    ("algorithm.use_kl_in_reward", "", "kl.where=reward", "with objective.kl and objective.kl_coef"),
    ("algorithm.kl_penalty", "as kl_loss_type", "objective.kl", ""),
    ("algorithm.kl_ctrl.kl_coef", "", "objective.kl_coef", ""),
    ("algorithm.kl_ctrl.target_kl algorithm.kl_ctrl.type", "", "kl.target", "a number makes the coefficient adaptive"),
    ("algorithm.kl_ctrl.horizon", "responses", "kl.horizon", ""),
    ("algorithm.filter_groups.enable algorithm.filter_groups.metric", "", "rollout.dynamic_sampling", "by the reward"),
    ("algorithm.filter_groups.max_num_gen_batches algorithm.filter_groups.max_inflight_gen_batches", "batches; 0: no bound", "rollout.dynamic_sampling", "times a round that queries are replaced; 0: off"),
    ("algorithm.rollout_correction.*", "", "rollout.on_logprob_gap=correct objective.importance_cap", "of a vLLM server: past rollout.max_logprob_gap ratios to the sampler are taken, by token, which objective.kind=importance truncates and importance_mask masks; stop (default) ends the run. The embedded engine has the trainer's log-probabilities"),
    ("algorithm.gamma algorithm.lam", "", "", "a completion is one action: there is nothing to discount"),
    ("algorithm.use_pf_ppo algorithm.pf_ppo.*", "", "rollout.keep", "chooses a query's rollouts of greatest reward variance"),
    # drawing
    ("actor_rollout_ref.rollout.temperature", "", "temperature", "of drawing and of the update, as there"),
    ("actor_rollout_ref.rollout.top_k", "-1: all", "rollout.top_k", "0: all"),
    ("actor_rollout_ref.rollout.top_p", "", "rollout.top_p", ""),
    ("data.max_prompt_length actor_rollout_ref.rollout.prompt_length", "tokens", "max_prompt_length", "longer prompts are left out and counted"),
    ("data.filter_overlong_prompts data.filter_overlong_prompts_workers data.truncation", "", "max_prompt_length", "longer prompts are always left out, none is cut"),
    ("data.max_response_length actor_rollout_ref.rollout.response_length", "tokens", "max_completion_length", ""),
    ("actor_rollout_ref.rollout.val_kwargs.n", "responses a prompt", "evaluation.num_samples", ""),
    ("actor_rollout_ref.rollout.val_kwargs.temperature", "0: greedy", "evaluation.temperature", "greedy answers are evaluation.greedy"),
    ("actor_rollout_ref.rollout.val_kwargs.do_sample", "", "evaluation.greedy", ""),
    ("actor_rollout_ref.rollout.val_kwargs.*", "", "", "evaluation draws from the whole softmax"),
    ("actor_rollout_ref.rollout.max_num_seqs", "sequences", "rollout.batch_size", ""),
    ("actor_rollout_ref.rollout.multi_turn.* actor_rollout_ref.rollout.agent.* data.*tool* data.image_* data.video_* data.audio_* data.mm_* data.return_*", "", "", _TEXT),
    ("actor_rollout_ref.rollout.name actor_rollout_ref.rollout.mode", "vllm, sglang, ...", "rollout.engine", "embedded (default) or vllm, with rollout.urls or rollout.server_python (docs/scaling.md)"),
    ("actor_rollout_ref.rollout.*", "", "rollout.server_command", _SERVER),
    # the optimizer
    ("actor_rollout_ref.actor.optim.lr", "", "learning_rate", ""),
    ("actor_rollout_ref.actor.optim.lr_warmup_steps", "optimizer steps", "warmup_rounds", "counts rounds"),
    ("actor_rollout_ref.actor.optim.lr_warmup_steps_ratio", "share of the steps", "warmup_ratio", ""),
    ("actor_rollout_ref.actor.optim.lr_scheduler_type actor_rollout_ref.actor.optim.warmup_style", "", "lr_scheduler_type", "constant, linear or cosine"),
    ("actor_rollout_ref.actor.optim.min_lr_ratio", "", "min_lr_ratio", ""),
    ("actor_rollout_ref.actor.optim.weight_decay", "", "weight_decay", ""),
    ("actor_rollout_ref.actor.optim.betas", "", "adam_beta1 adam_beta2", ""),
    ("actor_rollout_ref.actor.optim.clip_grad actor_rollout_ref.actor.grad_clip", "", "max_grad_norm", ""),
    ("actor_rollout_ref.actor.optim.*", "", "", "AdamW alone"),
    ("actor_rollout_ref.actor.fsdp_config.model_dtype actor_rollout_ref.actor.fsdp_config.dtype", "", "dtype", "of the weights; bfloat16 keeps float32 master weights"),
    # the model
    ("actor_rollout_ref.model.path", "", "model_name_or_path", ""),
    ("actor_rollout_ref.model.lora_rank actor_rollout_ref.model.lora.rank", "", "lora.rank", ""),
    ("actor_rollout_ref.model.lora_alpha actor_rollout_ref.model.lora.alpha", "", "lora.alpha", ""),
    ("actor_rollout_ref.model.target_modules actor_rollout_ref.model.lora.target_modules", "", "lora.targets", ""),
    ("actor_rollout_ref.model.enable_gradient_checkpointing", "on by default", "gradient_checkpointing", "off by default"),
    ("actor_rollout_ref.model.use_fused_kernels actor_rollout_ref.model.fused_kernel_options.* actor_rollout_ref.actor.use_fused_kernels", "", "", "the head is fused in any case"),
    ("actor_rollout_ref.model.use_remove_padding actor_rollout_ref.actor.use_remove_padding", "", "", "sequences are packed in any case"),
    ("actor_rollout_ref.model.custom_chat_template", "", "chat_template", "auto or never"),
    ("actor_rollout_ref.model.trust_remote_code data.trust_remote_code", "", "", "code that comes with a model is never run"),
    ("actor_rollout_ref.model.* actor_rollout_ref.*.use_torch_compile", "", "", ""),
    # data and rewards
    ("data.train_files data.val_files", "Parquet files", "task", "a folder with train and test files, or one of them (docs/tasks-and-rewards.md)"),
    ("data.train_max_samples", "prompts", "num_train_epochs", "part of a pass, such as 0.5"),
    ("data.val_max_samples", "prompts", "evaluation.max_queries", ""),
    ("data.apply_chat_template_kwargs", "", "chat_template_kwargs", ""),
    ("data.prompt_key", "a column", "task_options.prompt_column", ""),
    ("data.seed data.shuffle data.validation_shuffle actor_rollout_ref.actor.data_loader_seed actor_rollout_ref.actor.shuffle actor_rollout_ref.actor.fsdp_config.seed", "", "seed", "one seed for the order of prompts and for draws"),
    ("reward.custom_reward_function.* custom_reward_function.* data.reward_fn_key", "a file and a function", "reward.functions", "module.py:function"),
    ("reward.num_workers", "", "reward.workers", ""),
    ("reward.sandbox_fusion.memory_limit_mb sandbox_fusion.memory_limit_mb", "", "reward.memory_mb", ""),
    ("reward.* sandbox_fusion.* reward_model.*", "", "reward.functions", "rewards are functions in worker processes"),
    ("data.*", "", "", ""),
    # the run
    ("trainer.default_local_dir", "", "output_dir", ""),
    ("trainer.save_freq", "steps; -1: never", "save_steps", "rounds; 0: only at the end"),
    ("trainer.test_freq trainer.val_before_train", "steps; -1: never", "eval_steps", "rounds; before and after in any case"),
    ("trainer.max_actor_ckpt_to_keep", "", "save_total_limit", ""),
    ("trainer.resume_mode trainer.resume_from_path", "auto, disable, resume_path", "resume", "auto, never or a checkpoint folder"),
    ("trainer.logger", "", "report_to", "metrics.jsonl is written in any case"),
    ("trainer.log_val_generations trainer.rollout_data_dir trainer.validation_data_dir", "", "log_rollouts_steps", "rollouts and evaluations are Parquet files of the run folder"),
    ("trainer.val_only", "", "", "bandit-rft eval"),
    ("trainer.device", "", "device", ""),
    ("trainer.n_gpus_per_node", "", "", "torchrun --nproc_per_node starts so many processes, one a GPU (docs/scaling.md)"),
    ("trainer.nnodes", "", "", "torchrun --nnodes, with the same command on each (docs/scaling.md)"),
    ("actor_rollout_ref.actor.strategy", "fsdp, fsdp2, megatron, ...", "distributed.shard", "fsdp (FSDP2) or ddp"),
    ("trainer.critic_warmup critic.*", "", "", "there is no critic"),
    ("trainer.* ray_kwargs.* transfer_queue.* skip.* distillation.* global_profiler.*", "", "", ""),
    ("actor_rollout_ref.ref.*", "", "objective.kl_coef", "above 0 it loads the reference model"),
    ("actor_rollout_ref.nccl_timeout", "seconds", "distributed.timeout_s", "3600 by default"),
    ("actor_rollout_ref.hybrid_engine", "", "rollout.engine", "embedded (default): one copy of the weights trains and draws"),
    ("actor_rollout_ref.actor.ulysses_sequence_parallel_size actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size", "", "", "a sequence is not split over GPUs"),
    ("actor_rollout_ref.actor.fsdp_config.*", "", "distributed.shard", "fsdp or ddp; nothing is moved to host memory, and the rest is not adjustable"),
    ("actor_rollout_ref.*", "", "", ""),
))
#: Values of theirs where one of ours is expected: (our key, their value) -> what it is here.
VALUES: dict[tuple[str, str], str] = {
    ("advantage", "grpo"): "GRPO's is group_norm (num_generations >= 2); group_mean where it is not scaled (Dr. GRPO)",
    ("advantage", "dr_grpo"): "Dr. GRPO's is group_mean (num_generations >= 2)",
    ("advantage", "dapo"): "DAPO's is group_norm (num_generations >= 2)",
    ("advantage", "gae"): "verl's gae needs a critic, of which there is none; batch_mean and history_mean have a baseline",
    ("advantage", "reinforce_plus_plus"): "REINFORCE++'s is batch_norm",
    ("advantage", "reinforce_plus_plus_baseline"): "with the group's mean and the batch's deviation it is group_mean_batch_std",
    ("advantage", "reinforce"): "REINFORCE's is reward, or batch_mean with a baseline; objective.kind=reinforce is the loss",
    ("advantage", "remax"): "verl's remax is not here; rloo and group_mean have a baseline of the query",
    ("advantage", "opo"): "verl's opo is not here; rloo and group_mean have a baseline of the query",
    ("objective.kind", "grpo"): "GRPO's loss is ppo with objective.aggregation=seq-mean-token-mean",
    ("objective.kind", "dapo"): "DAPO's loss is ppo with objective.aggregation=token-mean objective.clip_high=0.28",
    ("objective.kind", "bnpo"): "TRL's bnpo is ppo with objective.aggregation=token-mean",
    ("objective.kind", "dr_grpo"): "TRL's dr_grpo is ppo with objective.aggregation=seq-mean-token-sum-norm and objective.norm_length=<max_completion_length>; its advantage is group_norm unless scale_rewards is off (then group_mean)",
    ("objective.kind", "vanilla"): "verl's vanilla is ppo with objective.dual_clip=3",
    ("objective.kind", "gpg"): "verl's gpg is reinforce",
    ("objective.kind", "luspo"): "TRL's luspo is gspo with objective.aggregation=seq-mean-token-sum (ppo with token-level ratios)",
    ("objective.kind", "sapo"): "sapo is not here",
    ("objective.kind", "vespo"): "TRL's vespo is not here",
    ("objective.kl", "low_var_kl"): "verl's low_var_kl is k3",
    ("objective.kl", "kl"): "verl's kl is k1",
    ("objective.kl", "mse"): "verl's mse is k2",
    ("objective.aggregation", "token-sum"): "verl's token-sum is not here; seq-mean-token-sum divides by the sequences",
}
# fmt: on
GUIDES = {"TRL": "docs/guides/from-trl.md", "verl": "docs/guides/from-verl.md"}


def row_of(typed: str, alike: bool = True) -> Row | None:
    """The row of a name: TRL's before verl's, one that names it before one of what is `alike`; None: nobody's."""
    found = [row for row in (*TRL, *VERL) if row.fits(typed) > (0 if alike else 1)]
    return max(found, key=lambda row: row.fits(typed), default=None)


def answer_to_name(typed: str, alike: bool = True) -> tuple[str, str] | None:
    """(our key or "", the row in words) for a name of a peer; None for any other."""
    row = row_of(typed, alike)
    return None if row is None else (row.key, f"{row.answer()} ({GUIDES[row.peer]})")


def answer_to_value(key: str, value: object) -> str:
    """What a peer's value for one of our keys is here; "" for any other."""
    return VALUES.get((key, value), "") if isinstance(value, str) else ""


def markdown(peer: str) -> str:
    """The table of one peer's names for its guide."""
    lines = ["| there | unit, values | here | |", "|---|---|---|---|"]
    for row in TRL if peer == "TRL" else VERL:
        names = ", ".join(f"`{name}`" for name in row.names.split())
        ours = ", ".join(f"`{key}`" for key in row.ours.split()) or "-"
        lines.append(f"| {names} | {row.unit} | {ours} | {row.note} |")
    return "\n".join(lines)
