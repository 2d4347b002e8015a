"""One rank of the Ulysses test: `ulysses_rank.py RANK FOLDER`. Runs the model in FOLDER split over two processes."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import diffusers
import torch
import torch.distributed as dist

import attnproc
from attnproc.kernels import BlockMask
from attnproc.processor import AttnProcessor, Plan

torch.set_num_threads(1)


@dataclass(kw_only=True)
class GivenBlocks(AttnProcessor):
    """The masks of the folder, layer by layer; notes how many tokens it is asked to plan for."""

    name: ClassVar[str] = "given"
    blocks: list
    tokens: list = field(default_factory=list)

    def plan(self, call):
        self.tokens.append(call.query.shape[2])
        return Plan(BlockMask.from_blocks(self.blocks[call.layer], call.layout.tokens, call.layout.tokens, (16, 16)))


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and there is none here
    saved = torch.load(folder / "model.pt")
    sparse = GivenBlocks(blocks=torch.load(folder / "blocks.pt"))
    for order in ("before", "after"):
        model = diffusers.WanTransformer3DModel(**saved["config"]).eval()
        model.load_state_dict(saved["state"])
        if order == "before":
            attnproc.install(model, sparse)
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
        result = {}
        for name, processor in (("sparse", sparse), ("dense", attnproc.DenseAttnProcessor())):
            if name == "dense" or order == "after":
                attnproc.install(model, processor)
            sparse.tokens.clear()
            with torch.no_grad():
                result[name] = model(**saved["inputs"], return_dict=False)[0]
            if name == "sparse":
                result["full_tokens"] = list(sparse.tokens)
                result["sparse_calls"] = [site.sparse_calls for site in attnproc.report(model).sites]
        result["fallbacks"] = {}
        for settings in sorted(folder.glob("*.json")):
            attnproc.install(model, AttnProcessor.load(settings))
            with torch.no_grad():
                calls = [{**saved["inputs"], "timestep": torch.tensor([time])} for time in (900, 500)]
                result[settings.stem] = torch.cat([model(**call, return_dict=False)[0] for call in calls])
            result["fallbacks"] |= attnproc.report(model).fallbacks
        if rank == 0:
            torch.save(result, folder / f"{order}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
