"""A sweep from Python: what ``rltune sweep experiments/mix.yaml`` does, made small enough for a coffee.

Every ``# %%`` is a cell in an editor, or in Jupyter by way of jupytext; ``python experiments/python_api.py`` runs all
of it, and leaves ``runs/from-python``.
"""

# %%
from pathlib import Path

import rltune

mix = Path(__file__).parent / "mix.yaml"
experiment = rltune.load(
    mix,
    {
        "name": "from-python",
        "sampler.steps": 4,
        "estimator.k": {"int": [1, 4]},
        "optim.steps": 4,
        "evaluate.every": 2,
        "evaluate.prompts": 4,
        "search.trials": 3,
        "resources.executor": "warm",  # trials as short as these share workers, with their models loaded once
    },
)

# %% [markdown]
# What it comes to, once nothing is known to be wrong with it. Nothing has started yet.

# %%
plan = rltune.plan(experiment)
print(f"{plan.workload.num_trials} trials, {plan.workload.num_concurrent} at a time, {plan.workload.num_images} images")


# %% [markdown]
# `watch` is called about once a second while trials run. The same call again goes on where a run was interrupted.


# %%
def watch(status: rltune.RunStatus) -> None:
    """Say where the run stands whenever another trial has ended."""
    if status.num_ended > len(ended):
        ended.append(status.num_ended)
        volume = f", hypervolume {status.front.hypervolume:.2f}" if status.front else ""
        print(f"{status.num_ended} of {status.num_trials} trials have ended{volume}")


ended: list[int] = []
run = rltune.sweep(experiment, watch=watch)

# %% [markdown]
# What it found, as plain data. `rltune.open_run("runs/from-python")` reads the same later, without torch and ray.

# %%
front = run.front
assert front is not None
for member in front["members"]:
    gains = ", ".join(f"{name} {member['metrics'][f'gain/{name}']:+.3f}" for name in front["objectives"])
    rank, k = (member["values"].get(path, "-") for path in ("model.lora.rank", "estimator.k"))
    print(f"trial {member['trial']}: {gains}  (rank {rank}, K {k})")
print(f"knee: trial {front['knee']}")

# %%
last = {row["trial"]: row for row in run.curves}
for trial, row in last.items():
    print(f"trial {trial} ended at step {row['step']:.0f} with a mixed reward of {row['train/reward']:+.3f}")

# %% [markdown]
# Its LoRAs were exported and proved: `pipeline.load_lora_weights(folder)` in diffusers.

# %%
for trial, folder in run.exports.items():
    print(f"trial {trial}: {folder}")
