"""What every stage needs: run folder, log, checkpoints, running averages, contact sheets."""
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

HERE = Path(__file__).resolve().parent
RUNS = Path(os.environ.get("LORAMIX_RUNS", HERE / "runs"))
OUT = Path(os.environ.get("LORAMIX_OUT", HERE.parent / "loramix" / "data"))
NOTES = Path(os.environ.get("LORAMIX_NOTES", HERE))   # logs, grids and floors
PORT = 29517   # where workers meet
SHORT = bool(os.environ.get("LORAMIX_SHORT"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
torch.set_flush_denormal(True)


def steps(count):
    """A stage's number of steps; a handful in a short run."""
    return 6 if SHORT else count


def log(stage, text):
    """Print a line and append it to the stage's log; of loras/KIND/NAME the name leads the line."""
    *where, name = stage.split("/")
    if where:
        text = f"{name}: {text}"
    path = NOTES / "logs" / f"{'-'.join(where) or name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(text, flush=True)
    with open(path, "a") as file:
        file.write(text + "\n")


EVERY = 4   # steps between updates of the running average


class Average:
    """An exponential running average of a model's weights."""

    def __init__(self, model, decay=.999):
        self.decay, self.model = decay, model
        self.values = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step)) ** EVERY
        for key, value in self.model.state_dict().items():
            self.values[key].lerp_(value, 1 - decay) if value.is_floating_point() else self.values[key].copy_(value)


def schedule(step, total, peak, warm=100, hold=.75):
    """Learning rate: a short rise, the peak until `hold` of the steps are done, then straight down to almost nothing."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * min(1., max(.01, (total - step) / ((1 - hold) * total)))


def save(path, **parts):
    """Write a checkpoint so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parts, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load(path):
    """Read a checkpoint (tensors and plain values only), or None."""
    return torch.load(path, weights_only=True) if path.exists() else None


def join(rank, workers):
    """Become one of several workers that train the same weights on their own core."""
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=workers)


def rank():
    """This worker's number; 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_alone(work):
    """Do a piece of work that leaves a file: the first worker before the others."""
    if not dist.is_initialized():
        return work()
    if rank():
        dist.barrier()
    result = work()
    if rank() == 0:
        dist.barrier()
    return result


def share_gradients(parameters):
    """Average the gradients of all workers."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view(gradient.shape) / dist.get_world_size())


def train(stage, models, loss_of, total, peak, decay=.999, every=100, betas=(.9, .99), weight_decay=.01, clip=1., keep=60.,
          at=(), then=None, parameters=None):
    """Train `models` with AdamW for `total` steps; resume from the stage's checkpoint; return the averages.

    loss_of(step, generator) → (loss, dict of numbers to log). `then(step, averages)` is called at the steps in `at`.
    """
    path, begun = RUNS / stage / "last.pt", time.time()
    module = torch.nn.ModuleList(models)
    average = Average(module, decay)
    chosen = parameters or [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=peak, betas=betas, weight_decay=weight_decay, fused=True)
    first, spent, state = 0, 0., load(path)
    if state:
        module.load_state_dict(state["model"])
        average.values = state["average"]
        optimiser.load_state_dict(state["optimiser"])
        first, spent = state["step"], state["spent"]
        if rank() == 0:
            log(stage, f"resumed at step {first}")
    saved, sums = time.time(), {}
    for step in range(first, total):
        generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + rank())
        torch.manual_seed(step)
        for group in optimiser.param_groups:
            group["lr"] = schedule(step, total, peak, warm=min(100, total // 4 + 1))
        loss, numbers = loss_of(step, generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(chosen)
        torch.nn.utils.clip_grad_norm_(chosen, clip)
        optimiser.step()
        if rank():
            continue   # the first worker keeps the books
        if step % EVERY == 0 or step + 1 == total:
            average.update(step)
        for key, value in numbers.items():
            sums.setdefault(key, []).append(float(torch.as_tensor(value).detach()))
        done = step + 1
        if done % every == 0 or done == total:
            shown = " ".join(f"{key} {sum(values) / len(values):.4f}" for key, values in sums.items())
            log(stage, f"step {done}/{total} {shown} seconds {spent + time.time() - begun:.0f}")
            sums = {}
        if time.time() - saved > keep or done == total:
            save(path, model=module.state_dict(), average=average.values, optimiser=optimiser.state_dict(), step=done,
                 spent=spent + time.time() - begun)
            saved = time.time()
        if then and done in at:
            with torch.no_grad():
                then(done, average)
    module.load_state_dict(average.values)
    return module


def sheet(path, rows):
    """Save a contact sheet of rows of [3, H, W] pictures in 0 … 1, in 200 colours to keep it small."""
    lines = [torch.cat([p.clamp(0, 1) for p in row], 2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=1.) for line in lines]
    array = (torch.cat(lines, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def to_picture(tensor):
    """[3, H, W] in 0 … 1 → PIL."""
    return Image.fromarray((tensor.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
