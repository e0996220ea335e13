"""Malformed experiments: each is answered by one error with all its faults, in words a user can act on."""

import pytest

from rltune.config.load import parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError

KNOWN = Known(
    rewards=("aesthetic", "alignment", "compressibility", "faithful", "variety"),
    estimators=("alignprop", "draft", "refl", "ddpo", "dpok"),
    judges=("diversity", "drift"),
    samplers=("surrogate", "tpe", "random", "nsga2"),
    rewards_without_gradient=("faithful",),
    policy_estimators=("ddpo", "dpok"),
    serial_estimators=("refl",),
    group_rewards=("variety",),
    executors=("train", "warm"),
    fixed_size_executors=("warm",),
)
FIRST_LINE = "rewards: {aesthetic: {weight: 1.0}}\n"
"""Stands before every text of VALUES, whose own first line is therefore line 2."""

VALUES: list[tuple[str, list[str]]] = [
    # keys
    ("optim: {learning_rat: 1}", ["x.yaml:2 optim.learning_rat: unknown key, got 'learning_rat'; known: lr, steps"]),
    ("optim: {max_gradnorm: 1}", ["got 'max_gradnorm'; did you mean 'max_grad_norm'? known: lr, "]),
    (
        "optimizer: {lr: 1e-3}",
        ["x.yaml:2 optimizer: unknown key, got 'optimizer'; did you mean 'optim'? known: name, "],
    ),
    ("seed: 1\nseed: 2", ["x.yaml:3 seed: stands here twice, got it first on line 2; delete one"]),
    ("optim:\n  lr: 1e-3\n  lr: 2e-3", ["x.yaml:4 optim.lr: stands here twice, got it first on line 3"]),
    (
        "optim.lr: 1e-3",
        ["a key must not hold a dot, got 'optim.lr'; write optim: {lr: ..}", "unknown key, got 'optim.lr'"],
    ),
    ("1: 2", ["x.yaml:2 1: unknown key, got '1'; known: name, task, model"]),
    # values of the wrong kind
    ("optim: 5", ["x.yaml:2 optim: must be a section with any of the keys lr, steps, "]),
    ("constraints: [diversity]", ["constraints: must be a section of names and their settings, got ['diversity']"]),
    ("seed: one", ["seed: must be a whole number, at least 0 and below 4294967296, got 'one'; the default is 0"]),
    ('optim: {batch: "8"}', ["optim.batch: must be a whole number, at least 1, got '8'; remove the quotes"]),
    ("optim: {batch: 8.0}", ["optim.batch: must be a whole number, at least 1, got 8.0; write 8"]),
    ("optim: {steps: true}", ["optim.steps: must be a whole number, at least 1, got true"]),
    ("optim: {lr: true}", ["optim.lr: must be a number from 0 to 1, got true; the default is 0.001"]),
    ("optim: {lr: null}", ["optim.lr: must be a number from 0 to 1, got nothing"]),
    ("search: {prune: 0}", ["search.prune: must be true or false, got 0; the default is false"]),
    ("search: {prune: no}", ["search.prune: must be true or false, got 'no'"]),
    ("name: 7", ["name: must be 1 to 100 letters, digits"]),
    ("name: a/b", ["name: must be 1 to 100 letters, digits, '.', '_' or '-', a letter or digit first, got 'a/b'"]),
    ("model: {base: 3}", ["model.base: must be text, got 3; the default is 'builtin'"]),
    ("model: {base: ''}", ["model.base: must be text, got ''"]),
    ("model: {lora: {alpha: rnk}}", ["model.lora.alpha: must be 'rank' or a number, above 0, got 'rnk'"]),
    (
        "model: {lora: {targets: mlp}}",
        ["must be 'attention' or 'all' or a list of items, each text, got 'mlp'; known: attention, all"],
    ),
    ("objectives: aesthetic", ["objectives: must be a list of items, each text, got 'aesthetic'"]),
    ("prompts: {train: ['cat: a cat', cat: a cat]}", ["prompts.train: must be text or a list of items, each text"]),
    ("evaluate: {judges: [drift, 3]}", ["x.yaml:2 evaluate.judges[1]: must be text, got 3"]),
    (
        "optim: {betas: [0.9]}",
        ["optim.betas: must be a list of 2 items, each a number, at least 0 and below 1, got [0.9]"],
    ),
    # values out of bounds
    ("optim: {lr: -1e-3}", ["optim.lr: must be a number from 0 to 1, got -0.001; the default is 0.001"]),
    ("optim: {lr: .nan}", ["optim.lr: must be a number from 0 to 1, got nan"]),
    ("sampler: {guidance: .inf}", ["sampler.guidance: must be a number from 0 to 100, got inf"]),
    ("estimator: {options: {x: [1.0, -.inf]}}", ["estimator.options.x[1]: must be a finite number, got -inf"]),
    ("constraints: {drift: {max: .inf}}", ["constraints.drift.max: must be a number, got inf"]),
    ("sampler: {height: 100, width: 64}", ["must be a whole number from 8 to 8192, a multiple of 8, got 100"]),
    ("optim: {betas: [0.9, 1.0]}", ["optim.betas[1]: must be a number, at least 0 and below 1, got 1.0"]),
    (
        "estimator: {draw: unifrom}",
        ["got 'unifrom'; did you mean 'uniform'? known: fixed, uniform, gaussian, per_step"],
    ),
    (
        "resources: {rewards_on: second_gpu}",
        [
            "resources.rewards_on: a worker has no second GPU where resources.gpus_per_worker is auto; write "
            "gpus_per_worker: 2"
        ],
    ),
    (
        "resources: {nodes: autoscale}",
        [
            "resources.concurrent: cannot be auto where nodes are yet to come, which would say it; write a number",
            "resources.gpus_per_worker: cannot be auto where nodes are yet to come, which would say it; write a number",
        ],
    ),
    ("resources: {gpus_per_worker: 1.5}", ["more than one GPU must be a whole number, got 1.5; round it up"]),
    ("resources: {precision: fp8}", ["must be 'auto', 'fp32' or 'bf16', got 'fp8'"]),
    ("resources: {concurrent: 0}", ["resources.concurrent: must be 'auto' or a whole number, at least 1, got 0"]),
    (
        "estimator: {checkpoint: sometimes}",
        ["x.yaml:2 estimator.checkpoint: must be 'auto', 'always', 'never' or 'serial', got 'sometimes'; known: "],
    ),
    (
        "estimator: {activation_gib: lots}",
        ["activation_gib: must be 'auto' or a number, at least 0, got 'lots'; the default is 'auto'"],
    ),
    ("estimator: {activation_gib: -1}", ["activation_gib: must be 'auto' or a number, at least 0, got -1"]),
    (
        "estimator: {guidance_gradient: txt}",
        [
            "estimator.guidance_gradient: must be 'both', 'text' or 'text_rescaled', got 'txt'; did you mean 'text'? "
            "known: both, text, text_rescaled"
        ],
    ),
    ("estimator: {k: 0}", ["estimator.k: must be a whole number from 1 to 1000, got 0"]),
    ("estimator: {std: 0}", ["estimator.std: must be a number, above 0, got 0"]),
    (
        "sampler: {base_steps: -1}",
        ["sampler.base_steps: must be a whole number from 0 to 999, got -1; the default is 0"],
    ),
    ("sampler: {base_steps: 1000}", ["sampler.base_steps: must be a whole number from 0 to 999, got 1000"]),
    (
        "prompts: {images_per_prompt: 0}",
        ["prompts.images_per_prompt: must be a whole number, at least 1, got 0; the default is 1"],
    ),
    ("prompts: {images_per_prompt: 2.0}", ["must be a whole number, at least 1, got 2.0; write 2"]),
    ("optim: {queries: 0}", ["x.yaml:2 optim.queries: must be a whole number, at least 1, got 0"]),
    ("optim: {queries: 1e3}", ["optim.queries: must be a whole number, at least 1, got 1000.0"]),
    ("optim: {ema: 1.0}", ["optim.ema: must be a number, at least 0 and below 1, got 1.0; the default is 0.0"]),
    ("optim: {ema: -0.1}", ["optim.ema: must be a number, at least 0 and below 1, got -0.1"]),
    ("regularize: {drift: -1}", ["regularize.drift: must be a number, at least 0, got -1; the default is 0.0"]),
    ("regularize: {flatness_weights: 1.5}", ["regularize.flatness_weights: must be a number from 0 to 1, got 1.5; "]),
    ("regularize: {flatness_image: 11}", ["regularize.flatness_image: must be a number from 0 to 10, got 11; "]),
    (
        "regularize: {kl: 0.1}",
        ["regularize.kl: unknown key, got 'kl'; known: drift, attention, flatness_weights, flatness_image"],
    ),
    (
        "resources: {prefix_precision: fp16}",
        ["must be 'same' or 'bf16', got 'fp16'; did you mean 'bf16'? known: same, bf16"],
    ),
    ("resources: {compile: 1}", ["resources.compile: must be true or false, got 1; the default is false"]),
    # values that do not fit each other
    (
        "sampler: {steps: 12}\nestimator: {k: 13}",
        ["x.yaml:3 estimator.k: K must not exceed the 12 sampling steps (sampler.steps), got 13; lower it to 12"],
    ),
    (
        "resources: {workers: 9}",
        ["optim.batch: must give each of the 9 workers an image (resources.workers), got 8; write 9 or more"],
    ),
    (
        "optim: {batch: 12, micro_batch: 13}",
        ["optim.micro_batch: must not exceed optim.batch, 12 images, got 13; write 12 or fewer"],
    ),
    (
        "resources: {workers: 2, min_workers: 3}",
        ["x.yaml:2 resources.min_workers: must not exceed resources.workers, 2, got 3; lower it or raise"],
    ),
    ("resources: {min_workers: 0}", ["resources.min_workers: must be a whole number, at least 1, got 0"]),
    ("resources: {cpus_per_worker: 0}", ["resources.cpus_per_worker: must be a whole number, at least 1, got 0"]),
    ("resources: {accelerator: 5}", ["resources.accelerator: must be text, got 5"]),
    (
        "resources: {workers: 2, min_workers: 1, gpus_per_worker: 0.5}",
        ["resources.gpus_per_worker: workers that come and go need whole GPUs, got 0.5 of one; write 1, or leave"],
    ),
    (
        "sampler: {steps: 12, base_steps: 12}",
        ["x.yaml:2 sampler.base_steps: must leave at least one of the 12 steps (sampler.steps), got 12; lower it"],
    ),
    (
        "sampler: {steps: 12, base_steps: 4}\nestimator: {k: 9}",
        [
            "x.yaml:3 estimator.k: K must not exceed the 12 sampling steps (sampler.steps) minus 4 base steps, got 9; "
            "lower it to 8 or raise sampler.steps"
        ],
    ),
    (
        "prompts: {images_per_prompt: 3}",
        [
            "x.yaml:2 prompts.images_per_prompt: must divide optim.batch, 8 images, got 3; "
            "write a divisor, or another batch"
        ],
    ),
    (
        "estimator: {name: ddpo}\nsampler: {eta: 0.0}",
        ["sampler.eta: ddpo learns from the noise of sampling, got eta 0; write eta: 1.0"],
    ),
    (
        "estimator: {name: dpok}\nsampler: {eta: 0}",
        ["x.yaml:3 sampler.eta: dpok learns from the noise of sampling, got eta 0; write eta: 1.0"],
    ),
    (
        "estimator: {checkpoint: serial}",
        [
            "x.yaml:2 estimator.checkpoint: serial mode needs detached inputs, which alignprop has not, got 'serial'; "
            "take auto or always, or one of refl"
        ],
    ),
    (
        "sampler: {eta: 1}\nestimator: {name: ddpo}\nregularize: {flatness_weights: 0.1}",
        [
            "x.yaml:4 regularize.flatness_weights: ddpo has no gradient of the reward to be flat in, got 0.1; "
            "set it to 0"
        ],
    ),
    (
        "sampler: {eta: 1}\nestimator: {name: ddpo}\nregularize: {flatness_image: 2}",
        ["x.yaml:4 regularize.flatness_image: ddpo has no gradient of the reward to be flat in, got 2.0; set it to 0"],
    ),
    ("sampler: {height: 64}", ["sampler.height: needs sampler.width beside it, got 64 alone; give both or neither"]),
    ("objectives: [alignment]", ["x.yaml:2 objectives[0]: nothing measures this, got 'alignment'; name a reward or"]),
    ("objectives: [drift, drift]", ["objectives[1]: stands here twice, got 'drift'"]),
    ("constraints: {divresity: {min: 0}}", ["nothing measures this, got 'divresity'"]),
    (
        "evaluate: {select: diversty}",
        ["x.yaml:2 evaluate.select: nothing measures this, got 'diversty'; write last, or name a reward or a judge"],
    ),
    ("objectives: [drift]\nconstraints: {collapse: {max: 0.1}}", ["nothing measures this, got 'collapse'"]),
    (
        "constraints: {collapse: {min_ratio_to_base: 0.5}}",
        ["collapse.min_ratio_to_base: the base model's collapse is 0, got 0.5 times that; write min or max in its "],
    ),
    ("constraints: {drift: {}}", ["constraints.drift: needs a bound, got none; give min_ratio_to_base, min or max"]),
    (
        "constraints: {drift: {min: 2, max: 1}}",
        ["constraints.drift.min: must not be above max 1.0, got 2.0; swap them"],
    ),
    # stopping that could never happen
    (
        "search: {prune: true, grace: 30}\nevaluate: {every: 20}",
        ["x.yaml:2 search.grace: must be a multiple of evaluate.every, 20 steps, got 30; write 40"],
    ),
    (
        "search: {prune: true, grace: 40}\noptim: {steps: 40}",
        [
            "x.yaml:2 search.grace: a trial has ended at step 40, before any are compared, got search.grace "
            "40; lower search.grace, or set search.prune: false"
        ],
    ),
    (
        "search: {prune: true}\noptim: {steps: 30, queries: 100, batch: 10}\nevaluate: {every: 10}",
        ["x.yaml:4 evaluate.every: a trial has ended at step 10, before any are compared, got evaluate.every 10"],
    ),
    ("search: {reduction: 1}", ["search.reduction: must be a whole number from 2 to 10, got 1; the default is 3"]),
    (
        "stop: {broken_constraint: 2}",
        [
            "x.yaml:2 stop.broken_constraint: there is no constraint to break, got 2; "
            "name one under constraints, or leave it out"
        ],
    ),
    (
        "stop: {gpu_hours: 8}\nresources: {gpus_per_worker: 0}",
        ["stop.gpu_hours: trials that use no GPU spend no GPU-hours, got 8; write stop.hours instead"],
    ),
    ("stop: {hours: 0}", ["stop.hours: must be a number, above 0, got 0"]),
    ("stop: {hours: {float: [1, 2]}}", ["stop.hours: "]),
    # names nobody knows
    (
        "estimator: {name: alingprop}",
        ["unknown estimator, got 'alingprop'; did you mean 'alignprop'? known: alignprop, dr"],
    ),
    (
        "search: {sampler: bayes}",
        ["search.sampler: unknown search sampler, got 'bayes'; known: surrogate, tpe, random, nsga2"],
    ),
    (
        "evaluate: {judges: [fid]}",
        ["evaluate.judges[0]: unknown judge, got 'fid'; known: diversity, drift, aesthetic, "],
    ),
    ("prompts: {eval: heldout}", ["prompts.eval: no such file, got 'heldout'"]),
    ("prompts: {train: builtn}", ["no such file, got 'builtn'"]),
    # not built yet
    (
        "resources: {executor: warm, workers: 2, min_workers: 1}",
        ["resources.min_workers: workers of the warm executor neither come nor go, got 1; leave it out, or write"],
    ),
    (
        "resources: {executor: warn}",
        ["resources.executor: unknown executor, got 'warn'; did you mean 'warm'? known: train, warm"],
    ),
    # distributions
    ("optim: {lr: {loguniform: [1, 2]}}", ["optim.lr.loguniform: unknown distribution, got"]),
    ("optim: {lr: {log_flaot: [1, 2]}}", ["got {log_flaot: [1, 2]}; did you mean 'log_float'? known: choice, int"]),
    ("optim: {lr: {}}", ["optim.lr: a distribution has one kind, got {}; write one of {choice: ..}, "]),
    (
        "optim: {lr: {float: [0.1, 0.2], choice: [1]}}",
        ["optim.lr: a distribution has one kind, got {float: [0.1, 0.2]"],
    ),
    ("optim: {lr: {log_float: [0, 1]}}", ["x.yaml:2 optim.lr.log_float[0]: must be above 0, got 0; a logarithm needs"]),
    ("optim: {lr: {float: [0.2, 0.1]}}", ["optim.lr.float: low must be below high, got [0.2, 0.1]; swap them"]),
    ("optim: {lr: {float: [0.1, 0.1]}}", ["got [0.1, 0.1]; write the value itself: 0.1"]),
    ("optim: {lr: {float: [0.1, .inf]}}", ["optim.lr.float[1]: must be a number, got inf; write {float: [low, high]}"]),
    (
        "optim: {lr: {float: 0.1}}",
        ["optim.lr.float: must be a list of two numbers, got 0.1; write {float: [low, high]}"],
    ),
    ("optim: {lr: {float: [0.1, 2]}}", ["optim.lr.float[1]: must be a number from 0 to 1, got 2.0"]),
    ("optim: {lr: {float: [0.1, 0.2], step: 1}}", ["optim.lr.step: only int takes a step"]),
    ("estimator: {k: {int: [1, true]}}", ["estimator.k.int[1]: must be a whole number, got true"]),
    ("estimator: {k: {int: [1, 6, 2]}}", ["estimator.k.int: must be a list of two whole numbers, got [1, 6, 2]"]),
    (
        "estimator: {k: {int: [1, 6], step: 2}}",
        ["estimator.k.int[1]: steps of 2 from 1 miss the high end, got 6; write 5"],
    ),
    ("estimator: {k: {int: [1, 5], step: 0}}", ["estimator.k.step: must be a whole number, at least 1, got 0"]),
    ("estimator: {k: {float: [1, 4]}}", ["k.float[0]: must be a whole", "k.float[1]: must be a whole"]),
    (
        "sampler: {steps: 20}\nestimator: {k: {int: [1, 40]}}",
        ["estimator.k.int[1]: K must not exceed the 20 sampling steps"],
    ),
    ("model: {lora: {rank: {choice: []}}}", ["model.lora.rank.choice: must be a list of at least one value, got []"]),
    ("model: {lora: {rank: {choice: 4}}}", ["model.lora.rank.choice: must be a list of at least one value, got 4"]),
    ("model: {lora: {rank: {choice: [4, 4]}}}", ["model.lora.rank.choice[1]: stands here twice, got 4; delete one"]),
    ("model: {lora: {rank: {choice: [4, [8]]}}}", ["model.lora.rank.choice[1]: must be a single value, got [8]"]),
    (
        "model: {lora: {rank: {choice: [4, 0]}}}",
        ["model.lora.rank.choice[1]: must be a whole number from 1 to 1024, got 0"],
    ),
    ("model: {lora: {choice: [1]}}", ["model.lora.choice: a whole section cannot be a distribution"]),
    ("name: {choice: [a, b]}", ["x.yaml:2 name: cannot be searched, got {choice: ['a', 'b']}; all trials share it"]),
    ("search: {trials: {int: [1, 2]}}", ["search.trials: cannot be searched, got {int: [1, 2]}; all trials share it"]),
    ("evaluate: {every: {int: [1, 2]}}", ["evaluate.every: cannot be searched"]),
    (
        "model: {lora: {targets: [to_q, {choice: [to_k, to_v]}]}}",
        ["model.lora.targets: must be 'attention' or 'all' or a list of items, each text, got ['to_q', {choice: "],
    ),
    ("optim: {lr: {simplex: true}}", ["optim.lr.simplex: not a reward's weight"]),
    (
        "prompts: {images_per_prompt: 2}\noptim: {batch: {int: [8, 12]}}",
        ["optim.batch.int: must divide optim.batch, 9 images, got 2"],
    ),
]

WHOLE: list[tuple[str, list[str]]] = [
    ("", ["x.yaml: the file is empty; write at least: rewards:"]),
    ("# nothing\n", ["x.yaml: the file is empty"]),
    ("- a\n- b", ["x.yaml: must be a mapping of sections, got ['a', 'b']"]),
    ("just text", ["x.yaml: must be a mapping of sections, got 'just text'"]),
    ("a: [1\nb: 2", ["x.yaml:2: not valid YAML at column 2 (expected ',' or ']', but got ':')"]),
    ("a:\n\tb: 1", ["x.yaml:2: not valid YAML at column 1 (found character '\\t' that cannot start any token)"]),
    ("a: 1\n--- \nb: 1", ["x.yaml:2: not valid YAML at column 1 (but found another document)"]),
    ("a: 1\nb: \x07", ["x.yaml:2: not valid YAML, got the character '\\x07'; delete it"]),
    ("a: !!python/name:os.system x", ["x.yaml:1: not valid YAML at column 4 (could not determine a constructor"]),
    ("a: &a [*a]", ["x.yaml:1: an alias holds itself; write the values out"]),
    ("? [a, b]\n: 1", ["x.yaml:1: a key must be text, got a list or mapping"]),
    ("seed: 1", ["rewards: there is nothing to train on, got no reward; name at least one"]),
    ("rewards:", ["x.yaml:1 rewards: there is nothing to train on"]),
    (
        "rewards: {aesthetic: 1.0}",
        ["rewards.aesthetic: must be a section with any of the keys reward, weight, loss, target, "],
    ),
    ("rewards: {aesthetic: {weight: -1}}", ["rewards.aesthetic.weight: must be a number, at least 0, got -1"]),
    (
        "rewards: {aesthetic: {weight: 0}}",
        ["rewards.aesthetic.weight: no reward has a positive weight, got 0 for every"],
    ),
    (
        "rewards: {aestetic: {}}",
        ["rewards.aestetic: unknown reward, got 'aestetic'; did you mean 'aesthetic'? known: "],
    ),
    (
        "rewards: {aesthetic: {loss: hing}}",
        [
            "rewards.aesthetic.loss: must be 'linear', 'hinge' or 'target', got 'hing'; did you mean 'hinge'? "
            "known: linear, hinge, target"
        ],
    ),
    ("rewards: {aesthetic: {target: high}}", ["x.yaml:1 rewards.aesthetic.target: must be a number, got 'high'"]),
    (
        "rewards: {aesthetic: {loss: hinge}}",
        [
            "x.yaml:1 rewards.aesthetic.loss: loss: hinge needs a target in the unit that the reward is "
            "reported in, got none; "
            "give target, or loss: linear"
        ],
    ),
    (
        "rewards: {aesthetic: {loss: target}}",
        ["aesthetic.loss: loss: target needs a target in the unit that"],
    ),
    (
        "rewards: {aesthetic: {target: 2}}",
        ["x.yaml:1 rewards.aesthetic.target: a linear loss has no target, got 2.0; write loss: hinge or loss: target"],
    ),
    (
        "rewards:\n  aesthetic:\n  faithful: {weight: 0.5}",
        [
            "x.yaml:3 rewards.faithful.weight: alignprop backpropagates rewards, and 'faithful' has no gradient; "
            "give it weight 0 to watch it only, or take an estimator that needs none: ddpo, dpok"
        ],
    ),
    (
        "rewards: {mine: {reward: faithful}}",
        ["x.yaml:1 rewards.mine.weight: alignprop backpropagates rewards, and 'faithful' has no gradient; give it"],
    ),
    ("rewards: {mine: {reward: aestetic}}", ["rewards.mine.reward: unknown reward, got 'aestetic'; did you mean 'aes"]),
    ("rewards: {mine: {reward: ''}}", ["rewards.mine.reward: must be text, got ''"]),
    (
        "rewards: {mine: {reward: aesthetic}}\nobjectives: [aesthetic]",
        ["objectives[0]: nothing measures this, got 'aesthetic'; name a reward or"],
    ),
    (
        "rewards: {mine: {reward: aesthetic}}\nevaluate: {judges: [mine]}",
        ["evaluate.judges[0]: unknown judge, got 'mine'; known: diversity, drift, aesthetic"],
    ),
    (
        "rewards: {diversity: {reward: aesthetic}}",
        [
            "rewards.diversity: something else is reported under this name, got 'diversity'; call it something else, "
            "as in my_diversity: {reward: aesthetic}"
        ],
    ),
    ("rewards: {reward: {reward: aesthetic}}", ["x.yaml:1 rewards.reward: something else is reported under this name"]),
    (
        "rewards: {aesthetic: , aesthetic_z: {reward: aesthetic}, drift_se: {reward: aesthetic}}",
        ["rewards.aesthetic_z: something else is reported", "rewards.drift_se: something else is reported"],
    ),
    (
        "rewards: {aesthetic: {relative: {positive: good}}}",
        ["rewards.aesthetic.relative.positive: needs negative words beside it, got 'good' alone; give both or neither"],
    ),
    (
        "rewards: {aesthetic: {relative: {negative: bad, k: -1}}}",
        [
            "rewards.aesthetic.relative.k: must be a number, at least 0, got -1",
            "rewards.aesthetic.relative.negative: needs positive words beside it, got 'bad' alone",
        ],
    ),
    (
        "rewards: {aesthetic: {relative: {k: 0.5}}}",
        ["rewards.aesthetic.relative.k: needs positive and negative words, without which it plays no part, got 0.5"],
    ),
    (
        "rewards: {aesthetic: {relative: {k: {float: [0, 1]}}}}",
        ["rewards.aesthetic.relative.k.float[1]: needs positive"],
    ),
    ("rewards: {aesthetic: {relative: {k: 1, positive: 3}}}", ["relative.positive: must be text, got 3"]),
    (
        "rewards: {aesthetic: {trust: {reference: nowhere, ceiling: 0.5}}}",
        [
            "rewards.aesthetic.trust.ceiling: must be a number, at least 1, got 0.5",
            "rewards.aesthetic.trust.reference: no such file or folder, got 'nowhere'; give a folder of images",
        ],
    ),
    ("rewards: {aesthetic: {negate: 1}}", ["rewards.aesthetic.negate: must be true or false, got 1"]),
    ("rewards: {aesthetic: {micro_batch: 0}}", ["aesthetic.micro_batch: must be a whole number, at least 1, got 0"]),
    (
        "rewards: {aesthetic: }\nmixture: {method: chebishev, rho: -1}",
        [
            "mixture.method: must be 'sum', 'chebyshev', 'win_rate', 'non_dominated', 'gradient_balance' or "
            "'min_norm', got 'chebishev'; did you mean 'chebyshev'?",
            "mixture.rho: must be a number, at least 0, got -1",
        ],
    ),
    *(
        (
            f"rewards: {{aesthetic: }}\nsampler: {{eta: 1}}\nestimator: {{name: ddpo}}\nmixture: {{method: {method}}}",
            [
                f"x.yaml:4 mixture.method: weighs gradients of rewards, of which ddpo uses none, got '{method}'; "
                "take sum, chebyshev or win_rate"
            ],
        )
        for method in ("non_dominated", "gradient_balance", "min_norm")
    ),
    (
        "rewards: {aesthetic: }\nmixture: {method: non_dominated}\noptim: {batch: 8, micro_batch: 4}",
        [
            "x.yaml:2 mixture.method: non_dominated compares the images of a whole batch, got 8 in parts of 4; leave "
            "optim.micro_batch out and resources.workers at 1, or take another method"
        ],
    ),
    (
        "rewards: {aesthetic: }\nmixture: {method: non_dominated}\nresources: {workers: 2}",
        ["x.yaml:2 mixture.method: non_dominated compares the images of a whole batch, got 8 in parts of 4; leave "],
    ),
    (
        "rewards: {aesthetic: }\nmixture: {method: {choice: [sum, non_dominated]}}\nresources: {workers: 2}",
        ["mixture.method.choice[1]: non_dominated compares the images of a whole batch, got 8 in parts of 4"],
    ),
    (
        "rewards: {aesthetic: }\nmixture: {method: {choice: [sum, non_dominated]}}\n"
        "optim: {micro_batch: {choice: [8, 4]}}",
        ["mixture.method.choice[1]: non_dominated compares the images of a whole batch, got 8 in parts of 4"],
    ),
    (
        "rewards: {aesthetic: }\nsampler: {eta: 1}\nmixture: {method: {choice: [sum, gradient_balance]}}\n"
        "estimator: {name: {choice: [alignprop, ddpo]}}",
        ["mixture.method.choice[1]: weighs gradients of rewards, of which ddpo uses none, got 'gradient_balance'"],
    ),
    # a step is scored in the arithmetic that drew it
    (
        "rewards: {aesthetic: }\nsampler: {eta: 1}\nestimator: {name: ddpo}\nresources: {prefix_precision: bf16}",
        [
            "x.yaml:4 resources.prefix_precision: ddpo learns from how likely each sampled step was, and must sample "
            "in the arithmetic it scores in, got 'bf16'; delete it; resources.precision: bf16 runs sampling"
        ],
    ),
    (
        "rewards: {aesthetic: }\nsampler: {eta: 1}\nestimator: {name: {choice: [refl, dpok]}}\n"
        "resources: {prefix_precision: bf16}",
        ["estimator.name.choice[1]: dpok learns from how likely each sampled step was"],
    ),
    (
        "rewards: {aesthetic: {relative: {positive: good, negative: bad, k: {float: [-1, 1]}}}}",
        ["rewards.aesthetic.relative.k.float[0]: must be a number, at least 0, got -1"],
    ),
    (
        "rewards: {mine: {reward: {choice: [aesthetic, faithful]}}}",
        ["rewards.mine.reward.choice[1]: alignprop backpropagates rewards, and 'faithful' has no gradient"],
    ),
    # rewards that compare the images of a prompt
    (
        "rewards: {mine: {reward: variety}}",
        [
            "prompts.images_per_prompt: variety compares the images of a prompt with one another, got 1 of each; "
            "write 2 or more"
        ],
    ),
    (
        "rewards: {variety: }\nprompts: {images_per_prompt: 2}\nevaluate: {images_per_prompt: 1}",
        ["x.yaml:3 evaluate.images_per_prompt: variety compares the images of a prompt with one another, got 1"],
    ),
    (
        "rewards: {variety: }\nprompts: {images_per_prompt: 4}\noptim: {micro_batch: 2}",
        [
            "x.yaml:3 optim.micro_batch: variety needs the images of a prompt together, got 2 images a worker at a "
            "time; let it be a multiple of 4 (prompts.images_per_prompt)"
        ],
    ),
    (
        "rewards: {variety: }\nprompts: {images_per_prompt: 4}\noptim: {batch: 12}\nresources: {workers: 4}",
        [
            "x.yaml:3 optim.batch: variety needs the images of a prompt together, got 3 prompts for 4 workers; let it "
            "be 16 or more, or lower resources.workers"
        ],
    ),
    (
        "rewards: {variety: }\nprompts: {images_per_prompt: 3}",
        ["x.yaml:2 prompts.images_per_prompt: must divide optim.batch, 8 images, got 3"],
    ),
    (
        "rewards: {variety: {micro_batch: 2}}\nprompts: {images_per_prompt: 2}",
        ["rewards.variety.micro_batch: variety compares images with one another, which cannot be split, got 2; leave"],
    ),
    (
        "rewards: {variety: , aesthetic: }\nprompts: {images_per_prompt: {choice: [1, 2]}}",
        ["prompts.images_per_prompt.choice[0]: variety compares the images of a prompt with one another, got 1"],
    ),
    (
        "rewards:\n  aesthetic:\n  faithful:\nestimator: {name: refl}",
        ["x.yaml:3 rewards.faithful.weight: refl backpropagates rewards, and 'faithful' has no gradient"],
    ),
    (
        "rewards:\n  aesthetic: {weight: {simplex: true}}\n  alignment: {weight: 1}\n  compressibility:",
        [
            "x.yaml:3 rewards.alignment.weight: must be on the simplex like rewards.aesthetic.weight, got 1; w",
            "x.yaml:4 rewards.compressibility.weight: must be on the simplex like rewards.aesthetic.weight, got 1.0",
        ],
    ),
    (
        "rewards: {aesthetic: {weight: {simplex: true}}}",
        ["a simplex needs at least two rewards, got one; write weight: 1.0"],
    ),
    ("rewards: {aesthetic: {weight: {simplex: yes}}}", ["rewards.aesthetic.weight.simplex: must be true, got 'yes'"]),
    (
        "rewards: {aesthetic: {weight: {simplx: true}}, alignment: {weight: {simplex: true}}}",
        ["rewards.aesthetic.weight.simplx: unknown distribution, got {simplx: true}; did you mean 'simplex'?"],
    ),
    (
        "rewards: {aesthetic: {weight: {simplex: true}}, alignment: {weight: {float: [0, 1]}}}",
        ["rewards.alignment.weight: must be on the simplex like rewards.aesthetic.weight, got {float: [0, 1]}"],
    ),
]


def faults_in(text: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(text, "x.yaml", known=KNOWN)
    assert caught.value.source == "x.yaml"
    assert caught.value.exit_code == 2
    return [str(fault) for fault in caught.value.faults]


def check(faults: list[str], expected: list[str]) -> None:
    assert len(faults) == len(expected), faults
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault
        where, _, rest = fault.partition(": ")
        assert where
        assert rest
        for jargon in ("Input should", "type=", "literal[", "validation error", "None", "True", "False"):
            assert jargon not in fault


@pytest.mark.parametrize(("text", "expected"), VALUES, ids=[text for text, _ in VALUES])
def test_each_fault_is_named_with_its_place_value_and_remedy(text: str, expected: list[str]) -> None:
    check(faults_in(FIRST_LINE + text), expected)


@pytest.mark.parametrize(("text", "expected"), WHOLE, ids=[text for text, _ in WHOLE])
def test_a_file_without_usable_content_is_answered_in_words(text: str, expected: list[str]) -> None:
    check(faults_in(text), expected)


@pytest.mark.parametrize(
    "text",
    [
        "rewards: {variety: {weight: 0}, aesthetic: }",
        "rewards: {variety: {weight: 0}, aesthetic: }\nprompts: {images_per_prompt: 2}\noptim: {micro_batch: 1}",
        "rewards: {variety: }\nprompts: {images_per_prompt: 2}\noptim: {micro_batch: 4}\nresources: {workers: 2}",
        "rewards: {mine: {reward: 'my_rewards:redness'}, other: {reward: 'my_rewards:redness', options: {x: 1}}}",
        "rewards: {a: {reward: aesthetic}, b: {reward: aesthetic, negate: true}}\nobjectives: [a, drift]\n"
        "constraints: {b: {min: 0}}",
        "rewards: {aesthetic_z: {reward: aesthetic}}",
        "rewards: {aesthetic: {trust: {reference: builtin}}, alignment: }\n"
        "mixture: {method: {choice: [sum, chebyshev, win_rate, non_dominated, gradient_balance, min_norm]}}",
        "rewards: {aesthetic: {trust: {reference: builtin}}, alignment: }\nsampler: {eta: 1}\n"
        "estimator: {name: ddpo}\nmixture: {method: win_rate}",
        "rewards: {aesthetic: }\nresources: {prefix_precision: bf16}\nestimator: {name: {choice: [refl, draft]}}",
        "rewards: {aesthetic: {relative: {positive: good, negative: bad, k: {float: [0, 1]}}}}\n"
        "mixture: {method: {choice: [sum, chebyshev, win_rate, non_dominated, gradient_balance, min_norm]}}",
        "rewards: {aesthetic: }\nsampler: {eta: 1}\nestimator: {name: ddpo}\n"
        "mixture: {method: {choice: [sum, chebyshev, win_rate]}, rho: {float: [0, 1]}}",
    ],
)
def test_what_rewards_may_be_is_not_refused(text: str) -> None:
    parse_experiment(text, "x.yaml", known=KNOWN)


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "model.base",
        "model.revision",
        "prompts.eval",
        "evaluate.prompts",
        "constraints.drift.min",
        "search.trials",
        "resources.workers",
    ],
)
def test_what_all_trials_share_cannot_be_searched(path: str) -> None:
    text = path.replace(".", ": {") + ": {choice: [1, 2]}" + "}" * path.count(".")
    check(
        faults_in(FIRST_LINE + text),
        [f"x.yaml:2 {path}: cannot be searched, got {{choice: [1, 2]}}; all trials share it"],
    )


def test_a_wrong_name_brings_no_fault_about_an_unknown_default() -> None:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(FIRST_LINE + "search: {sampler: 3}", known=Known(samplers=("random",)))
    assert len(caught.value.faults) == 1


def test_all_faults_are_listed_at_once_in_the_order_of_the_file() -> None:
    faults = faults_in("""\
rewards:
  aesthetic: {weight: heavy}
  aligment: {}
optim:
  lr: -1
  batch: 1
  stepz: 3
estimator:
  k: {int: [1, 30]}
  draw: {choice: [fixed, random]}
sampler: {steps: 20}
resources: {workers: 2, executor: worm}
seed: 1
seed: 2
""")
    places = [fault.split(": ")[0] for fault in faults]
    assert places == [
        "x.yaml:2 rewards.aesthetic.weight",
        "x.yaml:3 rewards.aligment",
        "x.yaml:5 optim.lr",
        "x.yaml:6 optim.batch",
        "x.yaml:7 optim.stepz",
        "x.yaml:9 estimator.k.int[1]",
        "x.yaml:10 estimator.draw.choice[1]",
        "x.yaml:12 resources.executor",
        "x.yaml:14 seed",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "sampler: {steps: four}\nestimator: {k: 30}",  # K is compared with no T that the user did not write
        "resources: {workers: two}\noptim: {batch: 1}",
        "evaluate: {judges: [3]}\nobjectives: [diversity]",
        "constraints: {drift: {min: low}}",
        "sampler: {base_steps: none}\nestimator: {k: 20}",
        "sampler: {eta: low}\nestimator: {name: ddpo}",
        "estimator: {name: 3, checkpoint: serial}",
        "prompts: {images_per_prompt: 3}\noptim: {batch: eight}",
    ],
)
def test_a_wrong_value_brings_no_fault_about_the_default_in_its_place(text: str) -> None:
    assert len(faults_in(FIRST_LINE + text)) == 1
