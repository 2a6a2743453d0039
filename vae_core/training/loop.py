"""The training loop: steps, checkpoints, logs and validation of one stage, on one process or many."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from . import processes
from .checkpoint import WEIGHTS, Checkpoints, TrainingError, read_checkpoint
from .clips import Batch
from .coders import Coder, make_coder
from .config import TrainConfig
from .discriminator import PatchDiscriminator
from .draws import Draws, draw
from .journal import Journal
from .losses import discriminator_hinge, find_lpips
from .objective import Objective, Trained, check_channels, full
from .schedule import Optimizers, moving_average
from .sources import frozen_image_vae, open_batches
from .tables import as_table, changes
from .validation import Validation, validate, validation_clips

FINAL = "final.safetensors"
logger = logging.getLogger("cviv_vae.training")


class BatchSource(Protocol):
    """Endless batches that can be continued."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last batch handed out."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        ...

    def close(self) -> None:
        """End what runs at the same time."""
        ...


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the caller is told, and asked, between steps.

    step: (steps done, steps in all, figures of the step). validation: (steps done, figures).
    should_stop: asked after each step; when it says yes, a checkpoint is written and the run ends.
    """

    step: Callable[[int, int, Mapping[str, float]], None]
    validation: Callable[[int, Mapping[str, float]], None]
    should_stop: Callable[[], bool]


class Trainer:
    """A stage in training. All that changes is in `trained`, `discriminator`, `averaged`, their optimizers, and `step`.

    Everything drawn at random follows from the config's seed and the number of the batch, so a run that is stopped and
    resumed is, on the CPU, bit for bit the run that was not.
    batches: in place of those of the config.
    """

    def __init__(self, config: TrainConfig, device: torch.device, batches: BatchSource | None = None) -> None:
        self.config = config
        self.device = device
        self.step = 0
        self.checkpoints = Checkpoints(folder=config.out / "checkpoints", keep=config.run.keep)
        self.trained = Trained(make_coder(config), config.regularization).to(device)
        self.optimizers = Optimizers(
            self.trained,
            config.optimizer,
            output_layer=f"coder.{self.trained.coder.output_layer}",
            apart="log_variances.",
        )
        self.discriminator, self.discriminator_optimizers = self._make_discriminator()
        self.averaged = self._make_average()
        self.objective = self._make_objective()
        self.batches = open_batches(config, processes.rank(), processes.world()) if batches is None else batches
        self.clips = self._validation_clips()
        self._step_trained = self._shared(self.trained, unused=config.model.family == "iv-vae")
        self._step_discriminator = self._shared(self.discriminator, unused=False)

    @property
    def coder(self) -> Coder:
        """The VAE as it is trained."""
        return self.trained.coder

    @property
    def best_coder(self) -> Coder:
        """The VAE to use: its moving average where there is one."""
        return self.coder if self.averaged is None else cast("Coder", self.averaged.module)

    def run(self, watch: Watch) -> bool:
        """Train to the last step. True when it was reached, False when `watch.should_stop` ended the run before.

        Raises TrainingError where a loss is not finite; it names the last good checkpoint.
        """
        run = self.config.run
        main = processes.rank() == 0
        journal = Journal(self.config.out, self.step) if main else None
        saved = self.step
        batches = iter(self.batches)
        self._validate(journal, watch, due=self.step == 0)
        try:
            while self.step < run.steps:
                figures = self._one_step(batches)
                self.step += 1
                watch.step(self.step, run.steps, figures)
                if journal is not None and (self.step % run.log_every == 0 or self.step == run.steps):
                    journal.write(self.step, figures)
                self._validate(journal, watch)
                stop = processes.any_of(watch.should_stop(), self.device)
                if self.step % run.save_every == 0 or stop:
                    self.save()
                    saved = self.step
                if stop and self.step < run.steps:
                    return False
            if saved < self.step or run.steps == 0:
                self.save()
            self._write_weights()
        finally:
            if journal is not None:
                journal.close()
        return True

    # ------------------------------------------------------------------------------------------------ one step

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        adversarial = self.config.discriminator
        turn = -1 if adversarial is None else self.step - adversarial.start
        if turn >= 0 and turn % 2 == 0:
            figures = self._train_discriminator(batches)
        else:
            figures = self._train_generator(batches, adversarial=turn >= 0)
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if processes.any_of(bool(broken), self.device):
            raise TrainingError(self._not_finite(broken))
        return figures

    def _train_generator(self, batches: Iterator[Batch], *, adversarial: bool) -> dict[str, float]:
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # it is used here, not trained

        def loss(video: Tensor, draws: Draws) -> Tensor:
            def step(trained: Trained) -> Tensor:
                return self.objective(trained, video, draws, adversarial=adversarial)

            return self._step_trained(step)

        figures = self._accumulate(batches, self._step_trained, loss, lambda: self.objective.figures)
        figures["gradient_norm"], figures["learning_rate"] = self.optimizers.step(self.step, self.config.run.steps)
        if self.averaged is not None and math.isfinite(figures["gradient_norm"]):
            self.averaged.update_parameters(self.coder)
        figures |= {f"logvar_{name}": float(value.detach()) for name, value in self.trained.log_variances.items()}
        return figures

    def _train_discriminator(self, batches: Iterator[Batch]) -> dict[str, float]:
        assert self.discriminator is not None
        assert self.discriminator_optimizers is not None
        self.discriminator.requires_grad_(True)
        noted: dict[str, Tensor] = {}

        def loss(video: Tensor, draws: Draws) -> Tensor:
            with torch.no_grad():
                fake = self.objective.reconstructed(self.trained, video, draws)
            real_scores, fake_scores = full(self._step_discriminator(torch.cat((video, fake)))).chunk(2)
            value = discriminator_hinge(real_scores, fake_scores)
            noted["discriminator"] = value.detach()
            noted["score_gap"] = (real_scores.mean() - fake_scores.mean()).detach()
            return value

        figures = self._accumulate(batches, self._step_discriminator, loss, lambda: noted)
        norm, _ = self.discriminator_optimizers.step(self.step, self.config.run.steps)
        return {**figures, "discriminator_gradient_norm": norm}

    def _accumulate(
        self,
        batches: Iterator[Batch],
        shared: nn.Module,
        loss: Callable[[Tensor, Draws], Tensor],
        noted: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, float]:
        """Gradients of the mean loss over the batches of a step, and the means of what was noted, in all processes."""
        count = self.config.run.accumulation
        sums: dict[str, Tensor] = {}
        for i in range(count):
            batch = next(batches)
            video = batch.video.to(self.device, non_blocking=True)
            first = processes.rank() * video.shape[0]
            draws = draw(
                tuple(video.shape), self.coder.latent_channels, seed=self.config.seed, index=batch.index, first=first
            )
            is_last = i == count - 1
            with shared.no_sync() if isinstance(shared, DistributedDataParallel) and not is_last else nullcontext():
                with self._precision():
                    value = loss(video, draws)
                (value / count).backward()
            for name, figure in noted().items():
                sums[name] = sums.get(name, 0) + figure / count
        names = list(sums)
        means = processes.mean(torch.stack([sums[name].float() for name in names])).tolist()
        return dict(zip(names, means, strict=True))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16")

    def _not_finite(self, names: list[str]) -> str:
        newest = self.checkpoints.newest()
        what = ", ".join(names) or "a figure of another process"
        good = f"The last good checkpoint is {newest}: go on from it with --resume" if newest else "There is none yet"
        return (
            f"Step {self.step + 1} gave values that are not finite: {what}. {good}, with a smaller rate (--set "
            "optimizer.learning_rate=...) or in full precision (--set run.precision=float32)."
        )

    # ------------------------------------------------------------------------------------------- saving, resuming

    def save(self) -> None:
        """Write a checkpoint of all that going on needs, and the VAE's weights beside it; all processes call this."""
        if processes.rank() == 0:
            path = self.checkpoints.save(self.step, self._state())
            self.best_coder.save(path.with_suffix(WEIGHTS))
        processes.wait()

    def resume(self) -> None:
        """Go on from the newest checkpoint; what the config says otherwise than it did then is logged.

        Raises TrainingError where there is none, or where the model is another one.
        """
        path = self.checkpoints.newest()
        if path is None:
            raise TrainingError(
                f"There is no checkpoint in {self.checkpoints.folder} to resume from: leave --resume out to begin."
            )
        state = read_checkpoint(path)
        for line in changes(state["config"], as_table(self.config)):
            logger.warning("%s was written with %s.", path.name, line)
        try:
            self._restore(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"{path} does not fit this config ({first}). Resume with the config that wrote it, or train into "
                "another folder (--set out=...)."
            ) from error

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "config": as_table(self.config),
            "trained": self.trained.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "batches": self.batches.state_dict(),
        }
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        if self.discriminator is not None and self.discriminator_optimizers is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizers"] = self.discriminator_optimizers.state_dict()
        return state

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.trained.load_state_dict(state["trained"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.batches.load_state_dict(state["batches"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.discriminator is not None and self.discriminator_optimizers is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizers.load_state_dict(state["discriminator_optimizers"])
        self.step = int(state["step"])

    def _write_weights(self) -> None:
        if processes.rank() == 0:
            self.best_coder.save(self.config.out / FINAL)
        processes.wait()

    # ------------------------------------------------------------------------------------------------ making

    def _make_discriminator(self) -> tuple[PatchDiscriminator | None, Optimizers | None]:
        config = self.config.discriminator
        if config is None:
            return None, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + 1)
            discriminator = PatchDiscriminator(config.width).to(self.device)
        return discriminator, Optimizers(discriminator, self.config.optimizer, learning_rate=config.learning_rate)

    def _make_average(self) -> AveragedModel | None:
        share = self.config.run.ema
        if share == 0:
            return None
        averaged = AveragedModel(self.coder, multi_avg_fn=moving_average(share))
        return averaged.requires_grad_(False)

    def _make_objective(self) -> Objective:
        config = self.config
        image_vae = None
        if config.regularization is not None:
            image_vae = frozen_image_vae(config.regularization.image_vae).to(self.device)
            check_channels(self.coder, image_vae, config.regularization.image_vae)
        weight = config.loss.lpips_weight
        return Objective(
            loss=config.loss,
            regularization=config.regularization,
            image_vae=image_vae,
            lpips=find_lpips(config.loss.lpips, weight).to(self.device) if weight > 0 else None,
            discriminator=self.discriminator,
            adversarial_weight=config.discriminator.weight if config.discriminator else 0.0,
        )

    def _validation_clips(self) -> list[Tensor]:
        if self.config.validation is None or processes.rank() > 0:
            return []
        return validation_clips(self.config.validation, images=self.config.stage == "image")

    def _validate(self, journal: Journal | None, watch: Watch, *, due: bool | None = None) -> None:
        validation = self.config.validation
        if validation is None:
            return
        if due is None:
            due = self.step % validation.every == 0 or self.step == self.config.run.steps
        if not due:
            return
        if journal is not None:
            result: Validation = validate(
                self.best_coder, self.clips, self.device, self.objective.image_vae, self.objective.lpips
            )
            journal.write(self.step, result.figures, "validation")
            journal.show(self.step, result.grid)
            watch.validation(self.step, result.figures)
        processes.wait()

    def _shared(self, module: nn.Module | None, *, unused: bool) -> nn.Module:
        """`module`, with gradients averaged over the processes where there are several."""
        if module is None or processes.world() == 1:
            return module or nn.Identity()
        return DistributedDataParallel(module, find_unused_parameters=unused)
