"""TIAToolbox: WSIPatchDataset with its automatic tissue mask, in a DataLoader."""

import warnings

from serve import serve
from tiatoolbox.models.dataset import WSIPatchDataset
from torch.utils.data import DataLoader


def tile_and_decode(path, num_workers):
    shape = (256, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches = WSIPatchDataset(
            path, patch_input_shape=shape, stride_shape=shape, resolution=0.5, units="mpp", min_mask_ratio=0.1
        )
        loader = DataLoader(patches, batch_size=64, num_workers=num_workers)
        return sum(len(batch["image"]) for batch in loader)


if __name__ == "__main__":
    serve(tile_and_decode)
