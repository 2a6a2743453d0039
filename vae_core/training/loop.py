"""The training loop: steps, checkpoints, logs and validation of one stage, on one process or many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import processes
from .checkpoint import Checkpoints, TrainingError, is_full, read_checkpoint, why_it_ended
from .clips import Batch, BatchSource
from .coders import Coder
from .config import TrainConfig
from .data import TrainingDataError
from .draws import Draws, draw
from .journal import Journal, Means, Pace, Watch
from .losses import discriminator_hinge, find_lpips
from .networks import Networks
from .objective import Objective, Trained, check_channels, full
from .sources import frozen_image_vae, open_batches
from .tables import as_table, changes
from .validation import gives_numbers, validate, validation_clips

FINAL, BEST = "final.safetensors", "best.safetensors"
RETRY = 20  # steps after which a checkpoint is tried again that the disk had no room for
WAIT = 5  # seconds
logger = logging.getLogger("cviv_vae.training")


class Trainer:
    """A stage in training; all that changes is in `networks` and `step`.

    Everything drawn at random follows from the config's seed and the number of the batch, so a run that is stopped and
    resumed is, on the CPU, bit for bit the run that was not.
    batches: in place of those of the config.
    """

    def __init__(self, config: TrainConfig, device: torch.device, batches: BatchSource | None = None) -> None:
        self.config = config
        self.device = device
        self.step = 0
        self.skipped = 0  # steps that were left out, since their values were not finite
        self.best: tuple[int, float] | None = None  # the validation with the highest PSNR: step and dB
        self.checkpoints = Checkpoints(folder=config.out / "checkpoints", keep=config.run.keep)
        self.networks = Networks(config, device)
        self.objective = self._make_objective()
        self.batches = open_batches(config, processes.rank(), processes.world()) if batches is None else batches
        self.clips = self._validation_clips()
        self._means, self._pace = Means(), Pace()
        self._position = self.batches.state_dict()  # of the batches, before the step that is being made
        self._broken_in_row, self._went_back_to, self._unsaved = 0, -1, False
        self._changing = False  # whether weights are half of one step and half of the next
        self._step_trained = self._shared(self.networks.trained, unused=config.model.family == "iv-vae")
        self._step_discriminator = self._shared(self.networks.discriminator, unused=False)

    @property
    def coder(self) -> Coder:
        """The VAE as it is trained."""
        return self.networks.trained.coder

    @property
    def best_coder(self) -> Coder:
        """The VAE to use: its moving average where there is one."""
        return self.networks.best_coder

    def run(self, watch: Watch) -> bool:
        """Train to the last step. True when it was reached, False when `watch.should_stop` ended the run before.

        Raises TrainingError where values are not finite again and again, and where a process or memory ends the run: it
        names the last good checkpoint.
        """
        journal = Journal(self.config.out, self.step) if processes.rank() == 0 else None
        if journal is not None:
            journal.describe(as_table(self.config), self.device)
        try:
            if not self._steps(journal, watch):
                return False
            if self.config.run.steps == 0 or self._unsaved:
                self._save_at_last(watch)
            self._write_weights()
        finally:
            if journal is not None:
                journal.close()
        return True

    def _steps(self, journal: Journal | None, watch: Watch) -> bool:
        run = self.config.run
        batches = iter(self.batches)
        self._validate(journal, watch, due=self.step == 0)
        while self.step < run.steps:
            figures = self._guarded_step(batches, journal)
            if figures is None:
                continue
            self._means.add(figures)
            self._pace.stepped()
            watch.step(self.step, run.steps, self._means.last)
            if self.step % run.log_every == 0 or self.step == run.steps:
                means, pace = self._means.take(), self._pace.figures(run.steps - self.step)
                if journal is not None:
                    journal.write(self.step, means)
                    journal.write(self.step, pace, "running")
                watch.pace(self.step, pace)
            self._validate(journal, watch)
            stop = processes.any_of(watch.should_stop(), self.device)
            due = self.step % run.save_every == 0 or (self._unsaved and self.step % RETRY == 0)
            if stop or self.step == run.steps or (due and self._broken_in_row == 0):
                self._save_if_good(journal)
            if stop and self.step < run.steps:
                if self._unsaved:
                    raise TrainingError(self.checkpoints.no_room(self.step))
                return False
        return True

    # ------------------------------------------------------------------------------------------------ one step

    def _guarded_step(self, batches: Iterator[Batch], journal: Journal | None) -> dict[str, float] | None:
        """One step, None where it went back; whatever ends it in an error leaves a checkpoint of what was before."""
        try:
            figures = self._one_step(batches)
        except (TrainingDataError, TrainingError):
            raise
        except Exception as error:
            raise self._emergency(error) from error
        self.step += 1
        self._position = self.batches.state_dict()
        broken = [name for name, value in figures.items() if not math.isfinite(value)]
        if not processes.any_of(bool(broken), self.device):
            self._broken_in_row = 0
            return {**figures, "skipped": float(self.skipped)}
        self.skipped += 1
        self._broken_in_row += 1
        what = ", ".join(broken) or "a figure of another process"
        logger.warning("Step %d gave values that are not finite (%s), and changes nothing.", self.step, what)
        if self._broken_in_row > self.config.run.most_skipped:
            self._go_back(journal, f"{self._broken_in_row} steps in a row gave values that are not finite ({what})")
            return None
        finite = {name: value for name, value in figures.items() if name not in broken}
        return {**finite, "skipped": float(self.skipped)}

    def _one_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        adversarial = self.config.discriminator
        turn = -1 if adversarial is None else self.step - adversarial.start
        if turn >= 0 and turn % 2 == 0:
            return self._train_discriminator(batches)
        return self._train_generator(batches, adversarial=turn >= 0)

    def _go_back(self, journal: Journal | None, why: str) -> None:
        """Restore the last good checkpoint; the batches go on, so that others come. Once to each checkpoint."""
        newest = self.checkpoints.newest()
        if newest is None or self.checkpoints.newest_step() == self._went_back_to:
            good = f"The last good checkpoint is {newest}: go on with --resume" if newest else "There is none yet"
            raise TrainingError(
                f"Step {self.step}: {why}. {good}, with a smaller rate (--set optimizer.learning_rate=...) or in full "
                "precision (--set run.precision=float32)."
            )
        logger.warning("Step %d: %s. Back to %s, and on from there with other batches.", self.step, why, newest.name)
        position, skipped = self.batches.state_dict(), self.skipped
        self._restore(read_checkpoint(newest))
        self.batches.load_state_dict(position)
        self._position, self.skipped = position, skipped
        self._broken_in_row, self._went_back_to = 0, self.step
        if journal is not None:
            journal.back_to(self.step)

    def _train_generator(self, batches: Iterator[Batch], *, adversarial: bool) -> dict[str, float]:
        if self.networks.discriminator is not None:
            self.networks.discriminator.requires_grad_(False)  # it is used here, not trained

        def loss(video: Tensor, draws: Draws) -> Tensor:
            def step(trained: Trained) -> Tensor:
                return self.objective(trained, video, draws, adversarial=adversarial)

            return self._step_trained(step)

        figures = self._accumulate(batches, self._step_trained, loss, lambda: self.objective.figures)
        sound = all(map(math.isfinite, figures.values()))
        self._changing = True
        norm, rate = self.networks.optimizers.step(self.step, self.config.run.steps, change=sound)
        figures |= {"gradient_norm": norm, "learning_rate": rate}
        if self.networks.averaged is not None and sound and math.isfinite(norm):
            self.networks.averaged.update_parameters(self.coder)
        self._changing = False
        figures |= {
            f"logvar_{name}": float(value.detach()) for name, value in self.networks.trained.log_variances.items()
        }
        return figures

    def _train_discriminator(self, batches: Iterator[Batch]) -> dict[str, float]:
        assert self.networks.discriminator is not None
        assert self.networks.discriminator_optimizers is not None
        self.networks.discriminator.requires_grad_(True)
        noted: dict[str, Tensor] = {}

        def loss(video: Tensor, draws: Draws) -> Tensor:
            with torch.no_grad():
                fake = self.objective.reconstructed(self.networks.trained, video, draws)
            real_scores, fake_scores = full(self._step_discriminator(torch.cat((video, fake)))).chunk(2)
            value = discriminator_hinge(real_scores, fake_scores)
            noted["discriminator"] = value.detach()
            noted["score_gap"] = (real_scores.mean() - fake_scores.mean()).detach()
            return value

        figures = self._accumulate(batches, self._step_discriminator, loss, lambda: noted)
        sound = all(map(math.isfinite, figures.values()))
        self._changing = True
        norm, rate = self.networks.discriminator_optimizers.step(self.step, self.config.run.steps, change=sound)
        self._changing = False
        return {**figures, "discriminator_gradient_norm": norm, "discriminator_learning_rate": rate}

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
            begun = time.perf_counter()
            batch = next(batches)
            self._pace.waited(time.perf_counter() - begun)
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

    # ------------------------------------------------------------------------------------------- saving, resuming

    def save(self) -> bool:
        """Write a checkpoint of all that going on needs, and the VAE's weights beside it; all processes call this.

        False where the disk had no room, which is logged: the older checkpoints then are as they were.
        """
        full = processes.rank() == 0 and not self._write()
        self._unsaved = processes.any_of(full, self.device)
        return not self._unsaved

    def _write(self) -> bool:
        return self.checkpoints.try_save(self.step, self._state(), self.best_coder.save)

    def _save_if_good(self, journal: Journal | None) -> None:
        """A checkpoint that others may go on from: its weights are finite, and so is what they make of a clip."""
        if processes.any_of(not self._looks_good(), self.device):
            self._go_back(journal, "weights, or what they make of a validation clip, are not finite")
        else:
            self.save()

    def _looks_good(self) -> bool:
        if not self.networks.are_finite():
            return False
        return not self.clips or gives_numbers(self.best_coder, self.clips[0], self.device)

    def _save_at_last(self, watch: Watch) -> None:
        """At the end of a run there is no later try: wait for room, or until somebody ends the run."""
        while not self.save():
            if watch.should_stop():
                raise TrainingError(self.checkpoints.no_room(self.step))
            time.sleep(WAIT)

    def _emergency(self, error: Exception) -> Exception:
        """Keep what was done before the step that failed; the error to raise."""
        why = why_it_ended(error)
        kept = False
        if processes.rank() == 0 and not self._changing and self.step > 0 and self.networks.are_finite():
            self.networks.optimizers.clear()
            kept = self._write()
        if not why:
            return error
        newest = self.checkpoints.newest()
        good = f"Go on from {newest} with --resume" if newest else "There is no checkpoint yet: begin again"
        lost = "" if kept else f"; what was done after it, up to step {self.step}, is lost"
        return TrainingError(f"Step {self.step + 1}: {why}. {good}{lost}.")

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
        return {
            "config": as_table(self.config),
            **self.networks.state_dict(),
            "batches": self._position,
            "means": self._means.state_dict(),
            "skipped": self.skipped,
            "best": list(self.best or ()),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.networks.load_state_dict(state)
        self.batches.load_state_dict(state["batches"])
        self._position = self.batches.state_dict()
        self._means.load_state_dict(state.get("means", {}))
        self.skipped = int(state.get("skipped", 0))
        best = state.get("best")
        self.best = (int(best[0]), float(best[1])) if best else None
        self.step = int(state["step"])

    def _write_weights(self) -> None:
        if processes.rank() == 0:
            self.best_coder.save(self.config.out / FINAL)
        processes.wait()

    # ------------------------------------------------------------------------------------------------ making

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
            discriminator=self.networks.discriminator,
            adversarial_weight=config.discriminator.weight if config.discriminator else 0.0,
        )

    def _validation_clips(self) -> list[Tensor]:
        if self.config.validation is None or processes.rank() > 0:
            return []
        return validation_clips(self.config.validation, images=self.config.stage == "image")

    def _validate(self, journal: Journal | None, watch: Watch, *, due: bool | None = None) -> None:
        validation = self.config.validation
        if validation is not None and due is None:
            due = self.step % validation.every == 0 or self.step == self.config.run.steps
        if validation is None or not due:
            return
        if journal is not None:
            result = validate(self.best_coder, self.clips, self.device, self.objective.image_vae, self.objective.lpips)
            journal.write(self.step, result.figures, "validation")
            journal.show(self.step, result.grid)
            watch.validation(self.step, result.figures)
            self._keep_if_best(result.figures["psnr"])
        processes.wait()

    def _keep_if_best(self, psnr: float) -> None:
        """The weights of the validation with the highest PSNR so far, as a file of their own."""
        if self.best is not None and psnr <= self.best[1]:
            return
        try:
            self.best_coder.save(self.config.out / BEST)
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning("There was no room for %s of step %d: it stays that of before.", BEST, self.step)
        else:
            self.best = (self.step, psnr)

    def _shared(self, module: nn.Module | None, *, unused: bool) -> nn.Module:
        """`module`, with gradients averaged over the processes where there are several."""
        if module is None or processes.world() == 1:
            return module or nn.Identity()
        return DistributedDataParallel(module, find_unused_parameters=unused)
