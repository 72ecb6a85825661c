"""Experiment trackers that hear what a training logs: one tracker run over all links of a run.

The metric log in the run directory is the queue: for each tracker a process beside rank 0 follows
it (`follow`), so that no step waits for a tracker, nothing that one draws from random generators
or leaves behind touches the training, and what one link could not tell the next one does. Rank 0
starts and ends these processes (`beside`); `lines` says what is told, `memory` how far it has been,
`tracker` what a tracker is. There is one module for each of them: `tensorboard`, `wandb`, `mlflow`
and `trackio`, which alone import the package of that name; `choice` knows them by name.
"""
