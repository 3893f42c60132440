"""Mutants of the loss as a model's own: its passes, heads, probe runs, and the records of trainers."""

from __future__ import annotations

from .patches import Mutant, mutants

FOLDER = "caref_kernels/integrations"
PASSES = f"{FOLDER}/passes.py"
HEADS = f"{FOLDER}/heads.py"
MODEL_LOSS = f"{FOLDER}/model_loss.py"
PROBE = f"{FOLDER}/probe.py"
TRANSFORMERS = f"{FOLDER}/transformers.py"
TRAINER = f"{FOLDER}/trainer.py"
TRL = f"{FOLDER}/trl.py"
COUNTING = f"{FOLDER}/counting.py"

INTEGRATIONS: list[Mutant] = [
    *mutants(
        "arguments of a pass ignored or misread",
        PASSES,
        "model_loss",
        "num_items or without_a_label or shift_labels or terms_of",
        ("divisor-ignored", "number = self.num_items\n", "number = None\n"),
        ("labels-not-shifted", "value=IGNORE_INDEX)[..., 1:]", "value=IGNORE_INDEX)[..., :-1]"),
        ("shift-labels-ignored", "if self.shift_labels is not None:", "if False:"),
        ("evaluation-without-labels-is-0", "and not torch.is_grad_enabled():", "and False:"),
        (
            "terms-recorded-once",
            "            recorder.append(terms)",
            "            recorder.append(terms)\n            break",
        ),
    ),
    *mutants(
        "token weights of a batch dropped, or not those of its labels",
        PASSES,
        "row_options_of_models",
        "",
        ("token-weights-not-shifted", "return shifted(weights) if self.form.shift and", "return weights if"),
        ("shift-labels-weights-shifted", "self.form.shift and self.shift_labels is None", "self.form.shift"),
        ("token-weights-dropped", '"token_weights": self.weights(device)}', '"token_weights": None}'),
    ),
    *mutants(
        "state that outlives its pass",
        PASSES,
        "model_life",
        "outlives or threads or inside",
        (
            "pass-not-unwound",
            "    try:\n        yield item\n    finally:\n        items[:]",
            "    yield item\n    if True:\n        items[:]",
        ),
        ("passes-shared-by-threads", "class _Thread(threading.local):", "class _Thread:"),
    ),
    *mutants(
        "a head fused where it must not be, or with something lost",
        HEADS,
        "heads heads_refused",
        "fused_head or untouched or hook or peft or adapters or autocast or replaced",
        ("any-head-fused", "if forward_pass is None or forward_pass.head is not module:", "if forward_pass is None:"),
        ("frozen-copy-of-the-head", "return head.modules_to_save[adapters[0]] if", "return head.original_module if"),
        ("hooks-accepted", "        if not module.startswith(TRUSTED_HOOKS):\n", "        if False:\n"),
        (
            "constant-bias-lost",
            "    if form.bias_name is not None:\n        constant",
            "    if False:\n        constant",
        ),
        ("softcap-lost", '"softcap": form.softcap}', '"softcap": None}'),
        ("scale-of-the-gradient-lost", " / forward_pass.form.logits.scale", ""),
        ("replaced-head-not-fused", "        if not isinstance(inner, cls):\n", "        if False:\n"),
    ),
    *mutants(
        "a model whose loss is not made, or made twice",
        MODEL_LOSS,
        "model_loss model_life heads",
        "fused_head or untouched or adds_itself or replaced_afterwards or loss_function_by or tuple or decoder_inputs",
        ("fused-in-evaluation", "self.fuse_head and model.training and torch", "self.fuse_head and torch"),
        ("fused-without-gradients", "model.training and torch.is_grad_enabled()", "model.training"),
        ("added-losses-dropped", "        if lost:\n", "        if False:\n"),
        ("uncalled-loss-function-accepted", "    elif not forward_pass.called_loss_function:\n", "    elif False:\n"),
        ("tuple-forgotten", "return output if returns_dict else output.to_tuple()", "return output"),
        ("logits-kept", '        changed["logits"] = None\n', "        pass\n"),
        ("labels-for-decoder-inputs", "= _decoder_inputs(model, labels)", "= labels.clamp_min(0)"),
    ),
    *mutants(
        "a probe run that sees nothing",
        PROBE,
        "heads heads_refused model_loss",
        "trial_notices or twice or masked_language or left or cannot_have or gemma2",
        (
            "logits-unchecked",
            "        if error <= allowed:\n            return form",
            "        if True:\n            return form",
        ),
        ("head-calls-uncounted", "    if len(first_run.outputs) != 1:\n", "    if False:\n"),
        ("always-shifted", "    shift = min(errors, key=errors.get)\n", "    shift = True\n"),
        ("modes-not-restored", "            module.training = training\n", "            pass\n"),
        ("ramp-within-the-softcap", "REACH = 300.0", "REACH = 1e-4"),
    ),
    *mutants(
        "removal that leaves something",
        TRANSFORMERS,
        "model_life heads heads_refused",
        "removal or untouched or user_has_set or trial_notices",
        ("head-left-wrapped", "        HeadForward.uninstall(head)\n", "        pass\n"),
        ("hook-left", "        if hook is refuse_fused_lm_head:\n", "        if False:\n"),
        ("failed-apply-left", "        remove_caref(base)\n        raise\n", "        raise\n"),
        ("attribute-left", '    vars(base).pop("accepts_loss_kwargs", None)\n', ""),
    ),
    *mutants(
        "records that are wrong, or wait for other ranks",
        TRAINER,
        "transformers",
        "record or evaluation or never_asks or asks_for_a_record or processes or model_init or metric or left_out",
        ("steps-not-divided", "self.divided) / steps", "self.divided)"),
        ("last-batch-counts-in-full", "self.trainer.gather_function(row", "self.trainer.accelerator.gather(row"),
        (
            "nan-batch-counts",
            "            if self.trainer.args.logging_nan_inf_filter and finite.any():",
            "            if False:",
        ),
        (
            "users-metric-overwritten",
            'output.metrics.setdefault(f"{prefix}_{name}", value)',
            'output.metrics[f"{prefix}_{name}"] = value',
        ),
        ("unused-loss-trains", "        if has_labels and not passes:\n", "        if False:\n"),
        (
            "new-models-forgotten",
            'return self.apply(self.original["call_model_init"](trial))',
            'return self.original["call_model_init"](trial)',
        ),
        (
            "collected-before-the-callbacks",
            "        control = event(args, state, control)\n"
            "        steps = state.global_step - self.last_step\n"
            "        if control.should_log",
            "        should_log, control = control.should_log, event(args, state, control)\n"
            "        steps = state.global_step - self.last_step\n"
            "        if should_log",
        ),
        (
            "processes-forgotten",
            "return trainer.accelerator.num_processes // trainer.get_tp_size()",
            "return 1",
        ),
    ),
    *mutants(
        "TRL's scaling or metrics lost",
        TRL,
        "trl",
        "trls_trainer or offers",
        (
            "router-loss-not-averaged",
            "self.router_aux_loss_coef / steps - scale * added",
            "self.router_aux_loss_coef - scale * added",
        ),
        ("accuracy-of-all-rows", "correct / valid if valid", "correct / tokens if valid"),
        (
            "entropy-as-reduced",
            "* (terms.valid if num_items is None else num_items)",
            "* 1",
        ),
    ),
    *mutants(
        "labels of a step miscounted",
        COUNTING,
        "count_items",
        "",
        ("first-label-counted", "(part[..., 1:] if shift else part)", "part"),
        ("last-micro-batch-alone", "total = torch.stack(counts).sum()", "total = counts[-1]"),
    ),
]
