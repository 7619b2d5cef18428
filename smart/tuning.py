"""Everything around the algorithm in a GRPO run: find and check its parts, build, resume, measure, save, finish.

``smart.grpo.train`` contains the algorithm and uses a ``Tuning`` for everything else.

Axes: N sequences of a batch, of which this process has n; P prompt length, T completion length.
"""

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from smart import Failure, UserError, objective, require
from smart.config import Config, TrainedReward, completed, dumps
from smart.cores import share, summary
from smart.corpus import Corpus
from smart.distributed import World, join
from smart.files import replace_files, sha256
from smart.guard import COMPLETIONS, Guard, HeldOut
from smart.logprobs import Reference
from smart.model import context_length, find_base, load_base, pick_device, pick_precision, save_base
from smart.plots import curves, timeline
from smart.prompts import LONGEST, Pieces, draw
from smart.render import Renderer, checked_soundfont, open_renderer
from smart.reward import Mixture, Reward
from smart.reward.mixture import Part, as_one
from smart.rollout import Agreement, Batch, Batches, Clips, Drawn, Scorer, completion_metrics, device_names
from smart.run import Opening, Run, Stopwatch, check_packages, checkpoint, confirm_settings, summarise
from smart.sampler import Rollout, Sampler
from smart.tokens import build_grammar, decode, vocabulary

# in a checkpoint: the batch that was sampled ahead; the names of the devices that the run used
AHEAD, DEVICES = "ahead.safetensors", "devices.txt"
CHECKED = 2  # iterations whose batches are checked: the second one's are drawn with other weights


class Parts(NamedTuple):
    """What a run needs from outside; it is found before any work starts."""

    base: Path
    soundfonts: list[Path]
    rewards: list[Part]
    judge: Reward | None  # a second reward for held-out completions, if one is configured
    judge_soundfont: Path | None  # through which the judge hears, if it is another one
    pieces: Pieces | None  # for prompts of kind "dataset"
    unseen: Pieces | None  # the same for held-out prompts, from another split


def preflight(config: Config, world: World, reward: Reward | None = None) -> Parts:
    """Find everything that a run needs; ``reward`` replaces the configured one.

    Raises one ``UserError`` that lists everything that is missing.
    """
    fonts = [partial(checked_soundfont, font) for font in config.render.fonts]
    rewards = objective.reward_finders(config, world.device, reward)
    base, *found = require(
        lambda: find_base(config.model.base),
        *fonts,
        *rewards,
        lambda: objective.find_named_judge(config, world.device),
        lambda: checked_soundfont(config.guard.soundfont) if config.guard.soundfont else None,
        lambda: _find_pieces(config, config.prompts.split),
        lambda: _find_unseen(config),
        lambda: check_packages(config.track.also),
    )
    soundfonts, found = found[: len(fonts)], found[len(fonts) :]
    parts = Parts(base, soundfonts, found[: len(rewards)], *found[len(rewards) : len(rewards) + 4])
    if reward is None:
        objective.check_rewards(config, parts.rewards, parts.soundfonts)
    return parts


def _find_pieces(config: Config, split: str) -> Pieces | None:
    if config.prompts.kind != "dataset":
        return None
    if not config.prompts.corpus:
        raise UserError("prompts.corpus is empty: set it to a folder written by `smart corpus build`")
    return Corpus(Path(config.prompts.corpus)).split(split)


def _find_unseen(config: Config) -> Pieces | None:
    if not config.track.held_out_every:
        return None
    split = "train" if config.prompts.split == "validation" else "validation"
    found = _find_pieces(config, split)
    if found is not None and not len(found):
        raise UserError(f"the corpus has no {split} pieces for held-out prompts; set track.held_out_every = 0")
    return found


def check_sizes(config: Config, world: World) -> None:
    """Raise ``UserError`` for settings that contradict each other or the number of processes."""
    settings, track = config.grpo, config.track
    if settings.combine != "sum" and (settings.scale == "none" or settings.diversity):
        raise UserError('grpo.combine = "normalised_sum": needs grpo.scale = "group" and grpo.diversity = 0')
    if not track.held_out_every and (settings.kl_budget or settings.stop_on_collapse):
        raise UserError("grpo.kl_budget and grpo.stop_on_collapse need measurements: set track.held_out_every above 0")
    shared = {"grpo.prompts": settings.prompts, "track.final_prompts": track.final_prompts}
    if track.held_out_every:
        shared["track.held_out_prompts"] = track.held_out_prompts
    for name, count in shared.items():
        if count < world.size:
            raise UserError(f"{name} = {count}: expected at least one for each of {world.size} processes")


class Tuning:
    """A GRPO run without its algorithm, as a context manager: entering it builds or resumes the run.

    ``reward`` replaces the configured one; ``opening`` are flags of ``smart.run.Opening``. Entering raises
    ``UserError`` for mistakes that the user can correct, before any work; leaving raises ``Failure`` if training cannot
    continue.

    ``train`` uses ``policy``, ``optimizer``, ``autocast`` (the precision of the policy's forward pass), ``world`` (all
    processes) and ``folder`` of the run; the other attributes are for the methods here.
    """

    def __init__(self, config: Config, *, reward: Reward | None = None, **opening: bool) -> None:
        if not (reward is None or isinstance(reward, Reward)):
            raise TypeError(f"reward: expected an object of a subclass of smart.reward.Reward, got {reward!r}")
        if reward is not None:  # name it in the run's configuration, so that nobody resumes with a different one
            given = TrainedReward(kind=reward.name, weights=reward.weights, deadline=config.reward.deadline)
            config = replace(config, reward=given, rewards=())
        self.config = config
        self.folder = Path(config.run.folder) / config.run.name
        self._before_update: int | None = None  # the current iteration, until it has changed the weights
        self._reward, self._opening = reward, Opening(**opening)
        self._opened = ExitStack()

    def __enter__(self) -> "Tuning":
        with ExitStack() as opened:
            self.world = opened.enter_context(join(pick_device(self.config.run.device)))
            settings = dumps(self.config)
            confirm_settings(self.world, "smart.grpo", settings, self._opening)
            with self.world.together():
                sources = self._find_parts()
            run = Run(
                self.folder,
                settings,
                program="smart.grpo",
                world=self.world,
                opening=self._opening,
                keep=self.config.track.keep_checkpoints,
                sources=sources,
                complete=completed,
            )
            self.run = opened.enter_context(run)
            self._find_rewards()
            self._build_models()
            self._open_files(opened)
            self._start_log()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._opened.__exit__(kind, error, trace)
        if isinstance(error, FloatingPointError | Failure) and self._before_update is not None:
            raise Failure(
                f"iteration {self._before_update} stopped before it changed the weights: {error}. "
                f"The last good checkpoint is {checkpoint.latest(self.run.checkpoints)}."
            ) from None

    # --- Building -----------------------------------------------------------------------------------------------------

    def _find_parts(self) -> dict[str, str]:
        """Find the run's parts and load the policy; returns what identifies them."""
        config, world = self.config, self.world
        self.parts = preflight(config, world, self._reward)
        check_sizes(config, world)
        self.policy, self.tokenizer = load_base(self.parts.base, device=world.device)
        longest = context_length(self.policy) - LONGEST
        if (wanted := config.sampling.max_new_tokens) > longest:
            raise UserError(f"sampling.max_new_tokens = {wanted}: expected at most {longest} for this base")
        return objective.identify(config, **self.parts._asdict())

    def _find_rewards(self) -> None:
        """Make one reward of all, with their targets, and find the judge."""
        config, world, parts = self.config, self.world, self.parts
        self.reward = parts.rewards[0].reward
        if self._reward is None:
            found = objective.find_targets(config, parts.rewards, parts.soundfonts, self.folder, world)
            self.reward = as_one(parts.rewards, found)
        self.judge = objective.find_judge(config, world.device, self.reward, self.parts.judge)

    def _build_models(self) -> None:
        """Make optimizer, reference and samplers; if the run is resumed, restore them from the last checkpoint."""
        settings, sampling, device = self.config.grpo, self.config.sampling, self.world.device
        precision = pick_precision(settings.precision, device)
        self.autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
        self._precisions = (precision, pick_precision(sampling.dtype, device))
        self.reference = Reference(
            self.policy, temperature=sampling.temperature, micro_batch=settings.micro_batch, autocast=self.autocast
        )
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), weight_decay=0.0, fused=device.type == "cuda")
        self.generators = {
            "prompts": torch.Generator().manual_seed(self.config.run.seed),
            "sampler": torch.Generator(device).manual_seed(self.config.run.seed),
        }
        facts, dtype = vocabulary(self.tokenizer), self._precisions[1]
        self._eos_id, self._grammar = facts.eos_id, build_grammar(self.tokenizer)
        self.samplers = {
            name: Sampler(model, pad_id=facts.pad_id, eos_id=facts.eos_id, dtype=dtype)
            for name, model in (("base", self.reference.model), ("tuned", self.policy))
        }
        last = self.run.last
        self.done = 0 if last is None else int(last.name)
        self._restored_rollout = None if last is None else self._restore(last)

    def _restore(self, last: Path) -> Rollout | None:
        """Restore checkpoint ``last``; returns this process's share of the batch that was sampled ahead, if any."""
        self._load_weights(last)
        checkpoint.read_state(last, self.policy, self.optimizer, **self.generators)
        if not (last / AHEAD).is_file():
            return None
        groups, size = self.world.share(self.config.grpo.prompts), self.config.grpo.group_size
        try:
            whole = Rollout(**checkpoint.read_tensors(last / AHEAD))
            share = whole.rows(slice(groups.start * size, groups.stop * size))
        except TypeError as error:
            raise UserError(f"checkpoint {last}: {AHEAD} does not hold a batch ({error})") from None
        return share.to(self.world.device)

    def _load_weights(self, folder: Path) -> None:
        self.policy.load_state_dict(load_base(folder, device=self.world.device)[0].state_dict())

    def _open_files(self, opened: ExitStack) -> None:
        """Open the run's files and its renderer, and set up sampling, rating and measuring."""
        render, sampling = self.config.render, self.config.sampling
        self.run.open(self.done, self.config.grpo.iterations, "iteration", also=self.config.track.also)
        self._workers = render.workers or share(self.world.neighbours)
        rendering: dict[str, Any] = {
            "sample_rate": render.sample_rate,
            "seconds": render.seconds,
            "workers": self._workers,
            "deadline": render.deadline,
            "device": self.world.device,
            "bank_megabytes": render.bank_megabytes,
        }
        renderer: AbstractContextManager[Renderer] = open_renderer(render.backend, self.parts.soundfonts, **rendering)
        pool = opened.enter_context(renderer)
        scorer = Scorer(
            self.tokenizer,
            pool,
            self.reward,
            sample_rate=render.sample_rate,
            seconds=render.seconds,
            deadline=math.inf if isinstance(self.reward, Mixture) else self.parts.rewards[0].deadline,
        )
        judge_pool: Renderer | None = None
        if self.judge is not None and (font := self.parts.judge_soundfont) is not None:
            other: AbstractContextManager[Renderer] = open_renderer(render.backend, font, **rendering)
            judge_pool = opened.enter_context(other)
        self.batches = Batches(
            scorer,
            self.world,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        self._devices = device_names(self.world)
        self.batches.agreement = self._agreement()
        self.guard = self._open_guard(judge_pool)
        self.watch = Stopwatch()
        self._drawn_ahead = None if self._restored_rollout is None else self._render_rollout(self._restored_rollout)
        self._render_metrics: dict[str, float] = {}  # of the current batch

    def _agreement(self) -> Agreement | None:
        """The check of the sampler, if the run uses CUDA devices that it has not used before."""
        last = self.run.last
        known = last is not None and (last / DEVICES).is_file() and (last / DEVICES).read_text("utf-8") == self._devices
        if self.world.device.type != "cuda" or known:
            return None
        return Agreement(
            self.samplers.values(),
            self.world,
            autocast=self.autocast,
            precision=torch.bfloat16 if torch.bfloat16 in self._precisions else torch.float32,
            micro_batch=self.config.grpo.micro_batch,
            options=self.batches.options,
            log=self.run.log,
        )

    def _open_guard(self, judge_pool: Renderer | None) -> Guard:
        """Set up the measurements on held-out prompts, which are drawn separately, with their own generator."""
        track, settings, held_out = self.config.track, self.config.grpo, None
        if track.held_out_every:
            seed = self.config.run.seed + 2**32
            held_out = HeldOut(
                self._draw_prompts(track.held_out_prompts, torch.Generator().manual_seed(seed), self.parts.unseen),
                seed=seed,
                batches=self.batches,
                judge=objective.make_judge(self.config, self.reward, self.judge, judge_pool),
                reference=self.reference,
                fonts=objective.fonts_of(self.config, 0, track.held_out_prompts),
            )
        guard = Guard(
            held_out,
            every=track.held_out_every,
            kl_budget=settings.kl_budget,
            stop_on_collapse=settings.stop_on_collapse,
        )
        if self.run.last is not None:
            guard.read(self.run.last)
            self.run.tidy_checkpoints(self.done, best=guard.best)
        return guard

    def _start_log(self) -> None:
        """Log what is about to happen, and measure the base if the run is new."""
        log, device = self.run.log, self.world.device
        iterations = self.config.grpo.iterations
        log(f"run {self.folder}: base {self.parts.base} on {device}, {self.done} of {iterations} iterations done")
        log(summary(self._workers))
        for font in self.parts.soundfonts:
            log(f"soundfont: {font.name}, SHA-256 {sha256(font)}")
        judge = self.guard.held_out.judge if self.guard.held_out else None
        for line in objective.described(self.config, self.reward, judge):
            log(line)
        if self.run.stopping():
            self.run.leave()
        if not self.done and (measured := self._look(0, "base")):
            self.run.files.metrics(0, measured)

    def _draw_prompts(self, count: int, generator: torch.Generator, pieces: Pieces | None) -> torch.Tensor:
        return draw(self.config.prompts.kind, count, self.tokenizer, generator, pieces=pieces).to(self.world.device)

    # --- One iteration ------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The remaining iterations, counted from 1; they end early if the guard stops the run."""
        self.watch.lap("start")  # belongs to no iteration
        for step in self.run.steps(self.done, self.config.grpo.iterations, unless=lambda: self.guard.stop):
            self.watch.restart()
            self.watch.lap("save")  # since the last iteration was logged
            self._before_update = step
            if step > self.done + CHECKED:
                self.batches.agreement = None
            yield step
        self.batches.agreement = None

    def draw(self, step: int) -> Drawn:
        """Sample this process's share of a batch; workers render each completion once it has settled.

        With ``rollouts_ahead`` = 1 this returns the batch sampled one iteration ago, and samples the next one.
        """
        drawn = self._drawn_ahead or self._draw_batch(step)
        more = self.config.grpo.rollouts_ahead and step < self.config.grpo.iterations
        # while the workers render ``drawn``
        self._drawn_ahead = self._draw_batch(step + 1)._replace(stale=True) if more else None
        self.watch.lap("generate")
        return drawn

    def reference_logprobs(self, drawn: Drawn) -> torch.Tensor:
        """Log-probabilities (n, T) of the completions under the frozen base."""
        ref_logp = self.reference.logprobs(drawn.rollout)
        self.watch.lap("reference")
        return ref_logp

    def _draw_batch(self, number: int) -> Drawn:
        settings = self.config.grpo
        return self.batches.draw(
            self.samplers["tuned"],
            self._draw_prompts(settings.prompts, self.generators["prompts"], self.parts.pieces),
            group_size=settings.group_size,
            generator=self.generators["sampler"],
            stopwatch=self.watch,
            fonts=objective.fonts_of(self.config, number, settings.prompts),
        )

    def _render_rollout(self, rollout: Rollout) -> Drawn:
        """Have a rollout from a checkpoint rendered: a batch that was sampled ahead."""
        settings = self.config.grpo
        fonts = self.batches.fonts_of_rows(
            objective.fonts_of(self.config, self.done + 1, settings.prompts), settings.group_size
        )
        clips = Clips(self.batches.scorer, self.watch, fonts=fonts)
        clips.submit_rest(rollout)
        first = self.world.share(settings.prompts).start * settings.group_size
        return Drawn(rollout, clips, first, stale=True)

    def rate(self, step: int, drawn: Drawn, ref_logp: torch.Tensor) -> Batch:
        """Rate the clips and gather the whole batch; ``ref_logp`` (n, T) is gathered with it.

        Raises ``Failure`` if no clip has a reward.
        """
        batch = self.batches.rate(drawn, ref_logp, keep=self._kept_rows(step))
        self._render_metrics = self._fallbacks(drawn)
        drawn.clips.free_audio()  # before the update, which needs the memory
        batch.rated.check()
        self.watch.lap("score")
        return batch

    def _fallbacks(self, drawn: Drawn) -> dict[str, float]:
        """The share of this process's clips that the note bank left to the workers, in all and by reason."""
        pool, clips = self.batches.scorer.pool, drawn.clips.in_order()
        share = pool.fallback_fraction(clips)
        if share is None:
            return {}
        kinds = {f"render/fallback_fraction_{kind}": part for kind, part in pool.fallback_kinds(clips).items()}
        return {"render/fallback_fraction": share} | kinds

    def _kept_rows(self, step: int) -> range:
        """Rows of the batch that are written as MIDI and WAV."""
        track = self.config.track
        return range(track.samples) if step % track.samples_every == 0 else range(0)

    def rewards(self, batch: Batch) -> torch.Tensor:
        """The rewards (N,) to learn from: the ratings, plus a bonus for diversity if ``grpo.diversity`` is above 0."""
        return objective.summed_rewards(self.config, self.reward, batch, self.tokenizer)

    def each_reward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What each of the K rewards with a weight gives, up to its target, (K, N), and their weights (K,)."""
        return objective.each_reward(self.config, self.reward, batch)

    def record(self, step: int, batch: Batch, advantages: torch.Tensor, stats: dict[str, float]) -> None:
        """Measure and log the iteration, save it if it is time; then exit if a signal asked for it.

        ``advantages`` (N,); ``stats`` are those of ``smart.grpo.update``.
        """
        self.watch.lap("learn")
        self._before_update = None
        run, track, group_size = self.run, self.config.track, self.config.grpo.group_size
        batch = batch._replace(rollout=batch.rollout.to("cpu"))  # once: the rest is no work for a GPU
        measured = self._look(step, "tuned")
        run.files.completions(
            row | {"step": step, "advantage": advantage}
            for row, advantage in zip(batch.rated.rows(batch.rollout, group_size), advantages.tolist(), strict=True)
        )
        self._write_pieces(f"samples/{step:08d}", batch, self._kept_rows(step))
        quality = completion_metrics(batch.rollout, self._eos_id, self._grammar)
        self.watch.lap("record")
        metrics = {
            **batch.rated.metrics(group_size),
            **(self.reward.metrics(batch.rated.scores, group_size) if isinstance(self.reward, Mixture) else {}),
            **{f"policy/{key}": value for key, value in stats.items()},
            "policy/learning_rate": self.optimizer.param_groups[0]["lr"],
            **quality,
            **self._render_metrics,
            **self.watch.metrics(),
            **measured,
        }
        run.files.metrics(step, metrics)
        if measured and self.guard.collapse:
            run.log(f"iteration {step}: diversity has collapsed: {self.guard.collapse}")
        if self.world.lead and track.trace_every and step % track.trace_every == 0:
            run.draw(timeline, self.watch.write(self.folder / "traces" / f"{step:08d}.json"))
        run.bar.set_postfix(reward=f"{metrics['reward/mean']:.3f}", kl=f"{stats['kl']:.4f}", refresh=False)
        run.bar.update()
        stopping = run.stopping()
        last, best = self.config.grpo.iterations, self.guard.best
        if step % track.checkpoint_every == 0 or step in (last, best) or self.guard.stop or stopping:
            self._save_checkpoint(step, metrics)
        if stopping:
            run.leave()

    def _look(self, step: int, name: str) -> dict[str, float]:
        """The guard's measurement after ``step`` iterations; pieces of it are kept as often as others are.

        The policy and the base write them for the same prompts with the same random numbers, so that they can be
        compared during the run.
        """
        track, held_out = self.config.track, self.guard.held_out
        measured = self.guard.look(step, self.samplers[name])
        if measured and held_out is not None and held_out.batch is not None:
            if step // track.samples_every > (step - track.held_out_every) // track.samples_every:
                rows = range(0, COMPLETIONS * min(track.samples, track.held_out_prompts), COMPLETIONS)
                self._write_pieces(f"held_out/{step:08d}", held_out.batch, rows)
            held_out.batch = None  # its audio
        return measured

    def _write_pieces(self, folder: str, batch: Batch, rows: range, ending: str = "") -> None:
        """Write ``rows`` of ``batch`` as MIDI and WAV, numbered from 0, and last their ratings."""
        ratings = {}
        for number, row in enumerate(rows):
            name, rated = f"{number:02d}{ending}", batch.rated
            score = decode(self.tokenizer, batch.rollout.tokens[row])
            self.run.files.write_piece(f"{folder}/{name}", score, rated.audio[row], self.config.render.sample_rate)
            ratings[name] = {"reward": rated.rewards[row].item()}
            ratings[name] |= {axis: values[row].item() for axis, values in rated.scores.items()}
        if ratings:
            self.run.files.write_ratings(f"{folder}/ratings{ending}.json", ratings)

    def _save_checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        ahead = None if self._drawn_ahead is None else self.batches.gather(self._drawn_ahead.rollout)
        self.run.confirm_weights(self.policy, step)
        if self.world.lead:
            self.run.save(step, partial(self._write_checkpoint, ahead), best=self.guard.best)
            self._draw_curve()
            self.run.log(
                f"iteration {step}: reward {metrics['reward/mean']:.3f}, KL {metrics['policy/kl']:.4f}, "
                f"{metrics['seconds/iteration']:.1f} s"
            )

    def _draw_curve(self) -> None:
        self.run.draw(curves, self.folder, ("reward/mean",), "reward", step="iteration")

    def _write_checkpoint(self, ahead: Rollout | None, target: Path) -> None:
        save_base(self.policy, self.tokenizer, target)
        checkpoint.write_state(target, self.policy, self.optimizer, **self.generators)
        self.guard.write(target)
        (target / DEVICES).write_text(self._devices, encoding="utf-8")
        if ahead is not None:
            save_file(ahead._asdict(), target / AHEAD)

    # --- The end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write ``tuned/``, the last policy or the best one, and compare it with the base on new prompts."""
        run = self.run
        if self.guard.stop:
            self.world.wait()  # until the lead has written the best checkpoint
            why, best = self.guard.stop, run.agree_on(self._best_checkpoint)
            assert best is not None
            self._load_weights(best)
            run.log(f"stopped early: {why}; tuned/ is iteration {int(best.name)}, the best by the held-out score")
        rewards = self._compare_rewards()
        if self.world.lead:
            # an existing tuned/ of a run that is resumed again is never left half replaced
            replace_files(
                self.folder / "tuned", partial(save_base, self.policy, self.tokenizer), last="model.safetensors"
            )
            text = summarise(self.folder, rewards)
            self._draw_curve()  # the last save may have been killed before it drew it
            run.log(text)
            run.log(f"page of pairs: {self._demo_command()}")
        for name in objective.stand_ins(self.reward):
            run.log(f"{name} is an approximation, not the aesthetic model: see docs/rewards.md")

    def _demo_command(self) -> str:
        """The command that makes the page on which base and tuned model are heard."""
        page = self.folder / "listen.html"
        words = ["--runs", f"base={self.folder}@base", f"tuned={self.folder}", "--out", str(page)]
        return shlex.join([sys.executable, "-m", "smart.demo", *words])

    def _best_checkpoint(self) -> Path:
        """The best checkpoint that is intact; a warning names each better one that is damaged.

        The guard drops its measurements of those. Raises ``UserError`` if all checkpoints are damaged.
        """
        guard, root = self.guard, self.run.checkpoints
        while (best := guard.best) is not None:
            folder = root / f"{best:08d}"
            try:
                checkpoint.verify(folder)
                return folder
            except UserError as error:
                if error.exit_code == 1:  # too many open files, say: it may be intact
                    raise
                if folder.exists():  # not all are kept
                    self.run.log(f"Warning: {error.message}; using the next best")
                guard.history = [one for one in guard.history if one.step != best]
        newest = checkpoint.latest(root)
        if newest is None:
            raise UserError(f"{root} holds no checkpoint any more; start over with --overwrite")
        return newest

    def _compare_rewards(self) -> dict[str, Any]:
        """Sample base and tuned model on the same new prompts with the same seed; returns the rewards of each."""
        track, device = self.config.track, self.world.device
        self.run.next_bar(2 * len(self.samplers), "step", "base against tuned")
        seed = self.config.run.seed + 2**31
        prompts = self._draw_prompts(track.final_prompts, torch.Generator().manual_seed(seed), self.parts.pieces)
        kept = range(min(track.final_listen, len(prompts)))
        rewards = {}
        for name, sampler in self.samplers.items():
            if self.run.stopping():
                self.run.leave()
            drawn = self.batches.draw(
                sampler,
                prompts,
                generator=torch.Generator(device).manual_seed(seed),
                fonts=objective.fonts_of(self.config, 0, len(prompts)),
            )
            self.run.bar.update()  # written
            if self.run.stopping():  # again, since rating takes long
                self.run.leave()
            batch = self.batches.rate(drawn, keep=kept)
            self.run.bar.update()  # rated
            rewards[name] = objective.by_name(self.reward, batch)
            self._write_pieces("final", batch, kept, f"-{name}")
        return rewards
