import pytest

from llmtune.recipe.loader import load_recipe

TWO = "data.train=[a.jsonl, b.jsonl]"
MASKED, PREFERENCE = ["task=completion", "completion.objective=masked"], ["task=preference"]
TEACHER = "distil={teacher: owner/teacher}"
CANDIDATES = ["model.name=null", "model.candidates=[a/b, c/d]"]
POINTING, WRITING = ["task=qa", "qa.style=extractive"], ["task=qa", "qa.style=generative"]


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["adapter.method=full", "adapter.r=8"], "adapter.r"),
        (["adapter.method=full", "adapter.target_modules=all-linear"], "adapter.target_modules"),
        (["adapter.method=full", "adapter.use_dora=false"], "adapter.use_dora"),
        (["adapter.method=full", "adapter.start_from=run"], "adapter.start_from"),
        (["adapter.bnb_4bit_quant_type=nf4"], "adapter.bnb_4bit_quant_type"),
        (["adapter.bnb_4bit_use_double_quant=true"], "adapter.bnb_4bit_use_double_quant"),
        (["adapter.start_from=run", "adapter.init_lora_weights=true"], "adapter.init_lora_weights"),
        (["adapter.start_from=run", "adapter.exclude_modules=x"], "adapter.exclude_modules"),
        (["adapter.start_from=run", "adapter.modules_to_save=[x]"], "adapter.modules_to_save"),
        (["train.batch_tokens=100", "train.batch_size=16"], "train.batch_size"),
        (["train.max_steps=10", "train.num_train_epochs=1"], "train.num_train_epochs"),
        (["data.validation=0", "train.eval_steps=5"], "train.eval_steps"),
        (["data.validation=0", "train.early_stopping_patience=5"], "train.early_stopping_patience"),
        (["data.validation=0", "train.early_stopping_threshold=0"], "train.early_stopping_threshold"),
        (["data.validation=0", "train.load_best_model_at_end=true"], "train.load_best_model_at_end"),
        (["train.early_stopping_threshold=0.1"], "train.early_stopping_threshold"),
        (["train.optim=sgd", "train.adam_beta1=0.9"], "train.adam_beta1"),
        (["adapter.method=full", "train.loraplus_lr_ratio=16"], "train.loraplus_lr_ratio"),
        (["train.optim=lion_8bit", "train.adam_epsilon=1e-8"], "train.adam_epsilon"),
        (["train.optim=adafactor", "train.adam_beta2=0.9"], "train.adam_beta2"),
        (["train.lr_scheduler_type=constant", "train.warmup_steps=5"], "train.warmup_steps"),
        (["train.lr_scheduler_kwargs={num_cycles: 2}"], "train.lr_scheduler_kwargs.num_cycles"),
        (["generation.temperature=0.7"], "generation.temperature"),
        (["generation.top_k=5", "generation.do_sample=false"], "generation.top_k"),
        (["generation.top_p=0.5"], "generation.top_p"),
        (["generation.min_p=0.5"], "generation.min_p"),
        (["data.split_by=author", "data.validation=0", "data.test=0"], "data.split_by"),
        (["data.train.config=x"], "data.train.0.config"),
        (["data.train.split=train"], "data.train.0.split"),
        (["data.train.revision=main"], "data.train.0.revision"),
        (["data.train.path=hub:x", "data.train.format=csv"], "data.train.0.format"),
        (["data.train.weight=2.0"], "data.train.0.weight"),
        ([TWO, "data.test={path: t, weight: 2}"], "data.test.0.weight"),
        (["model.name=./here", "model.revision=main"], "model.revision"),
        (["model.name=builtin:x", "model.revision=main"], "model.revision"),
        (["task=completion", "model.chat_template=t.jinja"], "model.chat_template"),
        (["task=completion", "model.chat_template_kwargs={a: 1}"], "model.chat_template_kwargs"),
        (["task=completion", "data.train_on=assistant"], "data.train_on"),
        (["completion={objective: causal}"], "completion"),
        (["task=completion", "completion.mask_probability=0.2"], "completion.mask_probability"),
        ([*MASKED, "generation.num_beams=2"], "generation.num_beams"),
        ([*POINTING, "generation.num_beams=2"], "generation.num_beams"),
        ([*POINTING, "qa.no_answer=x"], "qa.no_answer"),
        ([*WRITING, "qa.stride=8"], "qa.stride"),
        ([*WRITING, "qa.null_score_diff_threshold=0"], "qa.null_score_diff_threshold"),
        (["data.test=0", "evaluate.metrics=[loss]"], "evaluate.metrics"),
        (["data.test=0", "evaluate.gates=['loss < 3']"], "evaluate.gates"),
        (["data.test=0", "evaluate.samples=3"], "evaluate.samples"),
        (["data.test=0", "evaluate.champion=runs/best"], "evaluate.champion"),
        (["evaluate.gates=['loss < base']", "evaluate.when_unsure=report"], "evaluate.when_unsure"),
        (["evaluate.metrics=[loss]", "evaluate.choices=auto"], "evaluate.choices"),
        (["evaluate.metrics=[loss]", "evaluate.limit=3"], "evaluate.limit"),
    ],
)
def test_a_key_without_effect_is_refused_even_with_its_default_as_value(refuse, sets, key):
    (problem,) = refuse(sets=tuple(sets))
    assert problem.what.startswith(f"'{key}' has no effect ")
    assert problem.where == f"--set {key}"
    assert problem.fix


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["adapter.method=qlora", "adapter.bnb_4bit_quant_type=fp4"], "adapter.bnb_4bit_quant_type"),
        (["adapter.start_from=run", "adapter.r=8"], "adapter.r"),
        (
            ["adapter.start_from=run", "adapter.target_modules=[q]", "adapter.exclude_modules=[x]"],
            "adapter.exclude_modules",
        ),
        (["adapter.start_from=run", "adapter.lora_dropout=0.1"], "adapter.lora_dropout"),
        (["train.optim=lion_8bit", "train.adam_beta1=0.95"], "train.adam_beta1"),
        (["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={num_cycles: 2}"], "train.lr_scheduler_kwargs"),
        (["train.early_stopping_patience=2", "train.early_stopping_threshold=0.1"], "train.early_stopping_threshold"),
        (["generation.do_sample=true", "generation.temperature=0.7"], "generation.temperature"),
        (["data.split_by=author"], "data.split_by"),
        (["data.train.path=hub:x", "data.train.config=c", "data.train.split=s"], "data.train.0.split"),
        ([TWO, "data.train.0={path: a.jsonl, weight: 2}"], "data.train.0.weight"),
        (["model.revision=v1"], "model.revision"),
        (["task=completion", "completion.objective=causal"], "completion.objective"),
        (["task=completion", "data.train.format=text"], "data.train.0.format"),
        (["evaluate.choices=[yes, no]"], "evaluate.choices"),
        (["evaluate.limit=3"], "evaluate.limit"),
        (["deploy=merged"], "deploy.products"),
        (["deploy.limit=20", "deploy=merged"], "deploy.limit"),
        (["deploy=[merged, gguf]"], "deploy.products"),
        (["task=summarize", "deploy=[merged, fp8]"], "deploy.products"),
    ],
)
def test_the_same_key_is_accepted_where_it_has_an_effect(write, sets, key):
    assert load_recipe(write(), sets).origins[key] == "--set"


@pytest.mark.parametrize(
    ("sets", "what", "fix"),
    [
        (["model.name=a", "model.candidates=[a, b]"], "both 'model.name' and 'model.candidates'", "Keep one of them"),
        (["model.name=null"], "neither 'model.name' nor 'model.candidates'", "Name a model"),
        (["model.name=null", "model.candidates=[a, a]"], "names a model twice", "once"),
        (["task=qa", TEACHER], "'distil' has no effect with task: qa", "chat, completion, translate, summarize"),
        (["task=completion", "completion.objective=masked", TEACHER], "masks other tokens", "objective: causal"),
        (["train.loss_type=dft", TEACHER], "'train.loss_type' is dft", "remove distil"),
        (["task=classify", "distil={teacher: a/b, top_k: 8}"], "'distil.top_k' has no effect", "Remove it"),
        (["task=token-classify", "distil={teacher: a/b, top_k: 8}"], "'distil.top_k' has no effect", "Remove it"),
        (["distil.weight=0.3"], "'distil.teacher' is missing", ""),
        (["task=rerank", *CANDIDATES], "its models start from a new head", "one model"),
        (["task=embed", *CANDIDATES, "model.trials=5"], "'model.trials' compares bits per byte", "before tuning"),
        (["model.name=a/b/c"], "'model.name' is 'a/b/c'", "Name an existing folder"),
        (["model.name=hub:a/b"], "'model.name' is 'hub:a/b'", "without `hub:`: a/b"),
        (["model.name='builtin:'"], "without a name", "builtin:NAME"),
        (["data.train='hub:'"], "without a name", "hub:NAME"),
        (["data.train=ftp://host/x"], "a kind of address that llmtune cannot read", "s3://"),
        (["data.train=s3://bucket"], "names no file", "BUCKET/FILE"),
        (["data.train=https://me:secret@host/x.jsonl"], "with a password or a query", "~/.netrc"),
        (["data.train=https://host/x.jsonl?X-Amz-Signature=secret"], "with a password or a query", "s3://"),
        (["data.train=https://host/*.jsonl"], "do not list files", "Name each file"),
        (["data.validation=0.5", "data.test=0.5"], "together take 1 of the rows", "Leave some"),
        (["data.train.columns={promt: q}"], "maps 'promt'", "Did you mean 'prompt'?"),
        (["data.train.format=text"], "which task: chat cannot use", "messages, sharegpt"),
        (["task=completion", "data.train.format=messages"], "which task: completion cannot use", "prompt-completion"),
        (["adapter.method=qlora", "adapter.init_lora_weights=pissa"], "not quantised", "method: lora"),
        (["adapter.method=qlora", "adapter.init_lora_weights=pissa_niter_4"], "not quantised", "method: lora"),
        (["adapter.method=qlora", "adapter.init_lora_weights=olora"], "not quantised", "method: lora"),
        (["adapter.target_modules='(*'"], "not a regular expression", "write a list"),
        (["adapter.rank_pattern={'(*': 3}"], "not a regular expression", ""),
        (["train.warmup_steps=1.5"], "'train.warmup_steps' is 1.5", "share"),
        (["train.lr_scheduler_type=cosine_with_min_lr"], "needs either min_lr or min_lr_rate", "min_lr_rate"),
        (["train.lr_scheduler_type=warmup_stable_decay"], "needs num_decay_steps", "num_decay_steps"),
        (["model.attn_implementation=kernels-community/a/b"], "'model.attn_implementation' is", "Name a kernel"),
        (["model.attn_implementation=flash"], "'model.attn_implementation' is 'flash'", "auto, eager or sdpa."),
        (["train.seeds=[1, 2, 1]"], "names a seed twice: 1", "once"),
        (["train.seeds=[1, 42]"], "names the recipe's own seed, 42, again", "already trains with"),
        (["train.seeds=3"], "'train.seeds' is 3", "a list"),
        (["train.seeds=[-1]"], "'train.seeds.0' is -1", "at least 0"),
        ([f"train.seeds=[{2**32}]"], "'train.seeds.0'", "below"),
        (["train.seeds=[1.5]"], "'train.seeds.0' is 1.5", "an integer"),
        (["train.report_to=[wandb, wandb]"], "twice", "once"),
        (["evaluate.metrics=[los]"], "unknown metric 'los'", "Did you mean 'loss'?"),
        (["evaluate.metrics=[]"], "is empty", "remove the key"),
        ([*MASKED, "evaluate.metrics=[chrf]"], "'chrf' cannot be measured", "loss, perplexity, accuracy."),
        ([*MASKED, "evaluate.gates=['bits_per_byte < base']"], "uses a metric that is not computed", ""),
        (
            ["evaluate.gates=['loss.high < champion']"],
            "uses the champion, but evaluate.champion is not set",
            "evaluate.champion",
        ),
        (
            ["evaluate.champion=a", "evaluate.forgetting={}", "evaluate.gates=['forgetting.perplexity < champion']"],
            "compares a study with a champion",
            "with `base`",
        ),
        (
            ["task=rerank", "evaluate.gates=['ndcg@10 > tfidf']"],
            "uses tfidf, which this recipe does not have",
            "Compare with `ndcg@10 > bm25`.",
        ),
        (
            ["task=qa", "evaluate.gates=['f1 > tfidf']"],
            "uses tfidf, which this recipe",
            "Compare with `base` or a number.",
        ),
        (
            ["task=classify", "evaluate.metrics=[loss, accuracy]", "evaluate.gates=['loss < tfidf']"],
            "compares loss, which tfidf does not have",
            "Metrics of tfidf: accuracy.",
        ),
        (["evaluate.choices=null", "evaluate.gates=['loss < tfidf']"], "uses tfidf, which this recipe", "`base`"),
        (
            ["task=classify", "evaluate.champion=a", "evaluate.gates=['accuracy[new] > tfidf']"],
            "compares new rows with tfidf",
            "`base` or `champion`",
        ),
        ([*MASKED, "evaluate.gates=['accuracy > tfidf']"], "uses tfidf, which this recipe", "`base`"),
        (["task=qa", "qa.stride=384", "data.max_length=384"], "'qa.stride' is 384, and a window has 384 tokens", ""),
        ([*POINTING, "data.on_overlong=truncate"], "'data.on_overlong' is 'truncate'", ""),
        ([*PREFERENCE, "preference.loss=kto", "evaluate.metrics=[loss]"], "'loss' cannot be measured", "margin, kl."),
        ([*PREFERENCE, "preference.loss=orpo", "evaluate.metrics=[loss]"], "'loss' cannot be measured", "kl."),
        ([*PREFERENCE, "preference.loss=reward", "evaluate.metrics=[kl]"], "'kl' cannot be measured", "margin."),
        ([*PREFERENCE, "adapter.method=full", "evaluate.metrics=[kl]"], "no adapter can be switched off", "Remove it"),
        ([*PREFERENCE, "adapter.bias=all", "evaluate.metrics=[kl]"], "even with its adapter off", "Remove it"),
        (
            [*PREFERENCE, "preference.loss=kto", "evaluate.gates=['loss > 0']"],
            "that is not computed",
            "does not have it",
        ),
        (["task=summarize", "summarize.prompt=Say it."], "'summarize.prompt' does not contain {document}", ""),
        (["evaluate.metrics=[loss, loss]"], "names a metric twice", "once"),
        (["evaluate.metrics=[choice_accuracy]", "evaluate.choices=null"], "needs choices", "auto"),
        (["evaluate.choices=[a, a]"], "names an answer twice", "once"),
        (["evaluate.choices=[Ja, ja]"], "differ only by case or width: 'Ja', 'ja'", "one way"),
        (["evaluate.gates=[loss]"], "'loss' is not a gate", "`rougeL > base`"),
        (["evaluate.gates=['los < 1']"], "uses an unknown metric", "Did you mean 'loss'?"),
        (["evaluate.metrics=[chrf]", "evaluate.gates=['loss < 1']"], "not computed", "Add loss"),
        (["adapter.method=full", "deploy=merged"], "'merged' has no effect", "weights/"),
        (["deploy=[merged, merged]"], "twice", "once"),
        (["task=classify", "deploy=w4a16"], "'deploy: w4a16' is for models that continue a text", "Remove it"),
        (["task=token-classify", "deploy=gguf"], "'deploy: gguf' has no effect with task: token-classify", "Remove it"),
        (["data.train={path: rows.csv, encoding: nonsense}"], "which Python does not know", "cp1252"),
        (["data.train={path: hub:x, encoding: cp1252}"], "for a hub data set", "Remove it."),
        (["task=speech", "data.train=https://host/x.csv"], "recordings are read from disk", "Download them."),
        (["adapter.bias=oft_only"], "'oft_only', which belongs to another method", "lora_only"),
        (["adapter.method=vera", "model.add_tokens=['<x>']"], "which trains no embeddings", "trainable_tokens"),
        (["adapter.method=prompt_tuning", "task=classify"], "to the prompt of a decoder", "Use lora."),
        (["adapter.method=vera", "adapter.start_from=run"], "it continues LoRA adapters only", "lora or qlora"),
        (
            ["task=classify", "classify.labels=[a, b]", "classify.class_weights={c: 2}"],
            "has 'c', which is not a label",
            "Use: a, b.",
        ),
    ],
)
def test_conflicting_values_are_refused(refuse, sets, what, fix):
    (problem,) = refuse(sets=tuple(sets))
    assert what in problem.what
    assert fix in problem.fix
    assert problem.where.startswith("--set ") or problem.where == "recipe.yaml:3"


def test_early_stopping_needs_validation_rows_but_its_defaults_are_allowed(write):
    assert load_recipe(write(), ["data.validation=0"]).recipe.train.load_best_model_at_end


def test_masked_tokens_have_their_own_metrics(write):
    assert load_recipe(write(), MASKED).recipe.evaluate.metrics == ("loss", "perplexity", "accuracy")
