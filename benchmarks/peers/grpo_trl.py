"""The same work with TRL: GRPOTrainer with the recipe of the paper's public code, on one device.

    PYTHONPATH=.:benchmarks PYTHON benchmarks/peers/grpo_trl.py --settings settings.json [--json out.json]

It runs in a separate environment (see requirements.txt) and is called by benchmarks/iteration.py, which writes the
settings: folders of the base and of Audiobox Aesthetics, the soundfont, and the sizes of the run.

Like the authors' code it uses transformers' ``generate``; one synthesiser that renders one clip after another, through
a temporary MIDI file, with four seconds of discarded audio before each so that old notes decay; and the official
predictor's arithmetic in float32, one clip at a time. TRL's settings are those of the version at that time (loss
averaged over the batch's tokens, advantages divided by the group's standard deviation), bfloat16 on CUDA and float32
on a CPU. An iteration lasts from the end of one optimiser step to the end of the next, including TRL's logging; the
first one warms up and is left out.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import tinysoundfont
import torch
from datasets import Dataset
from miditok import REMI
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from smart.reward import resample

RATE = 16_000


class Stages(TrainerCallback):
    """Seconds of each stage of each step; "learn_and_rest" is the time that no other stage accounts for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.last = time.perf_counter()

    def add(self, stage: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        took = common.seconds(lambda: result.append(function(*args, **kwargs)), self.device)
        self.now[stage] = self.now.get(stage, 0.0) + took
        return result[0]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        whole = end - self.last
        self.steps.append(self.now | {"learn_and_rest": whole - sum(self.now.values()), "iteration": whole})
        self.now, self.last = {}, end


class Listener:
    """Renders and rates completions, one after another."""

    def __init__(self, settings: dict[str, Any], midi: REMI, stages: Stages, folder: Path) -> None:
        self.settings, self.midi, self.stages, self.folder = settings, midi, stages, folder
        self.synth = tinysoundfont.Synth(samplerate=settings["sample_rate"])
        self.soundfont = self.synth.sfload(settings["soundfont"])
        self.network = common.official_audiobox(Path(settings["audiobox"]), stages.device)

    def render(self, ids: list[int]) -> np.ndarray:
        """Audio (2, S) of prompt and completion together."""
        rate = self.settings["sample_rate"]
        score = self.midi.decode([ids])
        score = score.clip(0, 100 * score.ticks_per_quarter)
        self.synth.notes_off()
        self.synth.generate(4 * rate)  # old notes die away
        if not score.note_num():
            return np.zeros((2, rate), np.float32)
        path = self.folder / "clip.mid"
        score.dump_midi(path)
        self.synth.program_select(0, self.soundfont, 0, 0)
        sequencer = tinysoundfont.Sequencer(self.synth)
        sequencer.midi_load(str(path))
        end = score.to("second").end()
        samples = int(min(self.settings["seconds"], end) * rate)
        audio = np.frombuffer(self.synth.generate(max(samples, 1)), np.float32).reshape(-1, 2).T
        self.synth.callback = None
        return audio / (np.abs(audio).max() + 1e-6)

    def rate(self, audio: np.ndarray) -> float:
        """Content enjoyment of a clip (2, S)."""
        wave = resample(torch.from_numpy(np.ascontiguousarray(audio)), self.settings["sample_rate"], RATE).mean(0)
        return common.official_rating(self.network, wave)["CE"]

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = []
        for prompt, completion in zip(prompts, completion_ids, strict=True):
            ids = [self.midi.vocab[token] for token in prompt.split()] + list(completion)
            audio = self.stages.add("render", self.render, ids)
            rewards.append(self.stages.add("score", self.rate, audio) / 10)
        return rewards

    __name__ = "content_enjoyment"  # TRL names a reward by it


def words(midi: REMI) -> PreTrainedTokenizerFast:
    """TRL wants prompts as text: MidiTok's tokens, separated by spaces."""
    tokenizer = Tokenizer(WordLevel(dict(midi.vocab), unk_token="PAD_None"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="PAD_None",
        bos_token="BOS_None",
        eos_token="EOS_None",
        padding_side="left",
    )


def openings(midi: REMI, count: int, seed: int) -> Dataset:
    """``count`` procedural prompts: time signature and tempo drawn uniformly from the vocabulary."""
    rng = np.random.default_rng(seed)
    signatures, tempos = ([t for t in midi.vocab if t.startswith(kind)] for kind in ("TimeSig_", "Tempo_"))
    return Dataset.from_dict(
        {"prompt": [f"Bar_None {rng.choice(signatures)} Position_0 {rng.choice(tempos)}" for _ in range(count)]}
    )


def train(settings: dict[str, Any], device: str, folder: Path) -> list[dict[str, float]]:
    """Seconds per stage of each step, including the warm-up."""
    midi = REMI(params=Path(settings["base"]) / "tokenizer.json")
    tokenizer = words(midi)
    model = Phi3ForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
    model.config.use_cache = True  # off in our bases, since our sampler has its own cache
    rows, steps = settings["prompts"] * settings["group_size"], settings["iterations"]
    micro = min(settings["micro_batch"], rows)
    if rows % micro:
        raise SystemExit(f"micro_batch {micro}: expected a divisor of the {rows} completions of an iteration")
    stages = Stages(device)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=Listener(settings, midi, stages, folder),
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro,
            num_generations=settings["group_size"],
            max_completion_length=settings["max_new_tokens"],
            max_steps=steps,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            beta=settings["beta"],
            epsilon=settings["clip"],
            max_grad_norm=settings["max_grad_norm"],
            loss_type="bnpo",
            scale_rewards="group",
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            num_iterations=1,
            generation_kwargs={"use_cache": True},
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            seed=settings["seed"],
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=openings(midi, settings["prompts"] * steps, settings["seed"]),
        processing_class=tokenizer,
        callbacks=[stages],
    )
    generate = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: stages.add("generate", generate, *args, **kwargs)
    stages.last = time.perf_counter()
    trainer.train()
    return stages.steps


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="JSON that benchmarks/iteration.py writes")
    options = common.parse(parser)
    settings = json.loads(options.settings.read_text())
    with tempfile.TemporaryDirectory() as folder:
        steps = train(settings, options.device, Path(folder))[1:]
        common.trace(options.profile, lambda: train(settings | {"iterations": 1}, options.device, Path(folder)))
    times = {stage: [step[stage] for step in steps] for stage in steps[0]}
    medians = {stage: statistics.median(taken) for stage, taken in times.items()}
    print(f"{'stage':18}{'seconds':>9}{'share':>8}")
    for stage, taken in medians.items():
        print(f"{stage:18}{taken:9.3f}{taken / medians['iteration']:8.1%}")
    completions = settings["prompts"] * settings["group_size"]
    share = {stage: taken / medians["iteration"] for stage, taken in medians.items()}
    common.report(
        "iteration",
        options,
        {"completions": completions, "reward": "audiobox", "seconds": medians, "seconds_all": times, "share": share},
    )


if __name__ == "__main__":
    main()
