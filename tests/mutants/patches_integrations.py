"""Mutants of the loss as a model's own: its passes, heads, trial, and the records of trainers."""

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
        ("labels-not-shifted", "value=IGNORE_INDEX)[..., 1:] if self", "value=IGNORE_INDEX)[..., :-1] if self"),
        ("shift-labels-ignored", "if self.shift_labels is not None:", "if False:"),
        ("evaluation-without-labels-is-0", "and not torch.is_grad_enabled():", "and False:"),
        (
            "terms-recorded-once",
            "            recorder.append(terms)",
            "            recorder.append(terms)\n            break",
        ),
    ),
    *mutants(
        "state that outlives its pass",
        PASSES,
        "model_life",
        "outlives or threads or inside",
        (
            "pass-not-unwound",
            "    try:\n        yield\n    finally:\n        _running.passes.pop()",
            "    yield\n    _running.passes.pop()",
        ),
        ("passes-shared-by-threads", "class _Running(threading.local):", "class _Running:"),
    ),
    *mutants(
        "a head fused where it must not be, or with something lost",
        HEADS,
        "heads heads_refused",
        "fused_head or untouched or hook or peft or adapters or autocast or replaced",
        ("any-head-fused", "if one is None or one.head is not module:", "if one is None:"),
        ("frozen-copy-of-the-head", "return head.modules_to_save[adapters[0]] if", "return head.original_module if"),
        ("hooks-accepted", "    if unknown:\n", "    if False:\n"),
        (
            "constant-bias-lost",
            "    if form.bias_name is not None:\n        constant",
            "    if False:\n        constant",
        ),
        ("softcap-lost", '"softcap": form.softcap}', '"softcap": None}'),
        ("scale-of-the-gradient-lost", "(zero - zero.detach()) / one.form.logits.scale", "(zero - zero.detach())"),
        ("replaced-head-not-fused", "    if not isinstance(inner, kind):\n", "    if False:\n"),
    ),
    *mutants(
        "a model whose loss is not made, or made twice",
        MODEL_LOSS,
        "model_loss model_life heads",
        "fused_head or untouched or adds_itself or replaced_afterwards or loss_function_by or tuple or decoder_inputs",
        ("fused-in-evaluation", "state.fuse_head and model.training and torch", "state.fuse_head and torch"),
        (
            "fused-without-gradients",
            "model.training and torch.is_grad_enabled():\n            one.head",
            "model.training:\n            one.head",
        ),
        ("own-losses-dropped", "        if dropped:\n", "        if False:\n"),
        ("unasked-loss-accepted", "    elif not one.was_asked:\n", "    elif False:\n"),
        ("tuple-forgotten", "return output if wants_dict else output.to_tuple()", "return output"),
        ("logits-kept", '        changed["logits"] = None\n', "        pass\n"),
        ("labels-for-decoder-inputs", "= decoder_inputs(model, labels)", "= labels.clamp_min(0)"),
    ),
    *mutants(
        "a trial that sees nothing",
        PROBE,
        "heads heads_refused model_loss",
        "trial_notices or twice or masked_language or left or cannot_have or gemma2",
        (
            "logits-unchecked",
            "        if error <= allowed:\n            return form",
            "        if True:\n            return form",
        ),
        ("head-calls-uncounted", "    if len(first.outputs) != 1:\n", "    if False:\n"),
        ("always-shifted", "    shift = min(errors, key=errors.get)\n", "    shift = True\n"),
        ("modes-not-restored", "            module.training = training\n", "            pass\n"),
        ("ramp-within-the-softcap", "REACH = 300.0", "REACH = 1e-4"),
    ),
    *mutants(
        "removal that leaves something",
        TRANSFORMERS,
        "model_life heads heads_refused",
        "removal or untouched or user_has_set or trial_notices",
        ("head-left-wrapped", "        uninstall(head, HeadForward)\n", "        pass\n"),
        ("hook-left", "        if hook is refuse_fused_lm_head:\n", "        if False:\n"),
        ("failed-apply-left", "        remove_caref(base)\n        raise\n", "        raise\n"),
        ("attribute-left", '    vars(base).pop("accepts_loss_kwargs", None)\n', ""),
    ),
    *mutants(
        "records that are wrong, or wait for other ranks",
        TRAINER,
        "transformers",
        "record or evaluation or never_asks or asks_for_a_record or processes or model_init or metric or left_out",
        ("steps-not-divided", "scale = self._scale(sums.divided) / steps", "scale = self._scale(sums.divided)"),
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
        ("unasked-loss-trains", "        if has_labels and not passes:\n", "        if False:\n"),
        (
            "new-models-forgotten",
            'return self.apply(self.inner["call_model_init"](trial))',
            'return self.inner["call_model_init"](trial)',
        ),
        (
            "collected-before-the-callbacks",
            'return self._collect(self.inner_events["on_step_end"](args, state, control), state)',
            'return self.inner_events["on_step_end"](args, state, self._collect(control, state))',
        ),
        (
            "processes-forgotten",
            "return self.trainer.accelerator.num_processes // self.trainer.get_tp_size()",
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
            'terms.values[TERMS.index("entropy")] * number',
            'terms.values[TERMS.index("entropy")] * 1',
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
