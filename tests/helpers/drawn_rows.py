"""Rows drawn from documents of given lengths."""

import torch

from peagle.cod.sampling import Cod, sample_rows

CPU = torch.device("cpu")


def drawn(*lengths, seed=0):
    document = torch.repeat_interleave(torch.tensor(lengths))
    supervised = torch.rand(len(document), generator=torch.Generator().manual_seed(seed)) < 0.95
    generator = torch.Generator().manual_seed(seed)
    rows = sample_rows(supervised, document, cod=Cod(6, 0.8), generator=generator)
    return rows.mtp(), document
