"""The Lightning example in two processes: lightning_together.py EXAMPLES FOLDER.

Lightning starts the second one; each keeps its weights and what it drew in the last epoch.
"""

import sys

import torch

if __name__ == "__main__":
    examples, folder = sys.argv[1:]
    sys.path.insert(0, examples)
    import lightning_module

    torch.set_num_threads(1)
    trainer = lightning_module.main(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, enable_progress_bar=False
    )
    sampler = trainer.train_dataloader.sampler
    sampler.set_epoch(trainer.current_epoch - 1)
    found = {"weights": trainer.lightning_module.state_dict(), "rows": list(sampler)}
    torch.save(found, f"{folder}/process{trainer.global_rank}.pt")
