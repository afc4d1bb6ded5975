"""Settings of the run itself: length, batch, precision, what is kept and where."""

from dataclasses import dataclass

from caco_fast.engine.profile import steps_to_profile
from caco_fast.errors import UserError
from caco_fast.settings import require_at_least, setting, switch

PRECISIONS = ("auto", "f32", "tf32", "bf16", "fp16")
# A learned bank keeps as many records between two of its steps.
MOST_PARTS = 256


@dataclass(frozen=True)
class TrainerConfig:
    epochs: int = setting(200, "epochs of training, after the bank's initialisation")
    batch_size: int = setting(1024, "images per step over all ranks; each gives all its views")
    seed: int = setting(0, "seed of weights, bank, sample order and views")
    precision: str = setting(
        "auto",
        "precision of the encoders: f32, tf32, bf16, fp16, or auto: bf16 if the device has it, else fp16 on a GPU and "
        "f32 on a CPU; embeddings and losses are f32",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; under torchrun each rank takes its own GPU")
    cpu_threads: int = setting(0, "threads of CPU operations on each rank; 0: OMP_NUM_THREADS, or cores / local ranks")
    joint_views: str = setting(
        "auto",
        "views of one size pass the convolutions as one batch, with BatchNorm still per view: on, off, or "
        "auto: on with several ranks that share statistics, where it halves the collectives",
    )
    batch_norm_images: int = setting(
        0,
        "images that BatchNorm takes its statistics over in training, a group of one rank's batch; 0: the whole batch, "
        "over all ranks (SyncBN)",
    )
    shuffle_keys: bool = setting(
        True,
        "with batch_norm_images: deal the images of all ranks to the groups of the key encoder anew for every view, "
        "as MoCo does",
    )
    accumulate: int = setting(
        1, "parts of a step's batch, each with a forward and backward of its own, so that a large batch fits the memory"
    )
    checkpoint_activations: bool = setting(
        False, "compute activations of the backbone a second time in the backward pass instead of keeping them"
    )
    clip_gradient: float = setting(0.0, "largest norm of a step's gradients; larger ones are scaled to it; 0: none")
    compile: bool = setting(False, "torch.compile of encoders and loss; the first steps then take minutes")
    cuda_graph: bool = setting(False, "on a GPU, replay a step as a CUDA graph, without launches by the host")
    log_every: int = setting(10, "steps between two log lines; values in them are means over these steps")
    max_steps: int = setting(0, "stop after this many steps, with the initialisation; the schedule stays; 0: no stop")
    max_hours: float = setting(0.0, "stop with a checkpoint after so many hours of this start; 0: no stop")
    profile: str = setting("", "FIRST:LAST: a torch.profiler trace of these steps of the run, in the run folder")
    deterministic: bool = setting(False, "the same losses bit for bit on a GPU too, at a cost; a CPU gives them anyway")
    collective_timeout: int = setting(600, "seconds that a rank waits for the others before the run ends (status 75)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "joint_views", switch("trainer.joint_views", self.joint_views))
        if self.precision not in PRECISIONS:
            raise UserError(f"trainer.precision: found '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("log_every", 1), ("cpu_threads", 0), ("max_steps", 0)):
            require_at_least(f"trainer.{name}", getattr(self, name), least)
        require_at_least("trainer.collective_timeout", self.collective_timeout, 1)
        if self.batch_norm_images < 0 or self.batch_norm_images == 1:
            raise UserError(
                f"trainer.batch_norm_images: found {self.batch_norm_images}, expected 0 (all) or at least 2; one image "
                "has no spread"
            )
        if not 1 <= self.accumulate <= MOST_PARTS:
            raise UserError(f"trainer.accumulate: found {self.accumulate}, expected a number from 1 to {MOST_PARTS}")
        steps_to_profile(self.profile)
        if not 0 <= self.max_hours < float("inf"):
            raise UserError(f"trainer.max_hours: found {self.max_hours}, expected 0 (no stop) or a larger number")
        if not 0 <= self.clip_gradient < float("inf"):
            raise UserError(f"trainer.clip_gradient: found {self.clip_gradient}, expected 0 (none) or a larger number")


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = setting(1, "epochs between two checkpoints; epochs with kNN always have one; 0: only those")
    every_steps: int = setting(0, "steps between two checkpoints, within an epoch too; 0: none by steps")
    keep: int = setting(3, "number of newest checkpoints to keep, besides best.pt")
    keep_every: int = setting(0, "epochs between two checkpoints that stay for good, as epoch_0050.pt; 0: none")

    def __post_init__(self) -> None:
        for name, least in (("every_epochs", 0), ("every_steps", 0), ("keep", 1), ("keep_every", 0)):
            require_at_least(f"checkpoint.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class RunConfig:
    folder: str = setting("", "run folder; empty: runs/<name of the config file>")
    tensorboard: bool = setting(True, "write TensorBoard events to the run folder")
    report: bool = setting(True, "make the page of the run, report/index.html, at its end")
    scale_to_images: bool = setting(
        False, "choose what is not given, such as batch, epochs and bank, by the images and the device (scale.py)"
    )
    plain: bool = setting(False, "plain log lines instead of the progress bar, on a terminal too")
