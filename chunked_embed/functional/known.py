"""Which candidates are known to be no negatives: ids of queries and documents, and what is listed for a query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..gather import Ranks
from .arguments import Rows


class Ids(NamedTuple):
    """Of this process's queries, of their documents (the positives, then the lists of hard negatives), and of documents
    that are no negatives of a query."""

    queries: Tensor  # (N,)
    documents: Tensor  # (lists, N)
    false_negatives: Tensor  # (N, K)

    def rows(self) -> Rows:
        return {
            "query_id": self.queries,
            "document_id": self.documents[0],
            "false_negatives": self.false_negatives,
        }

    def columns(self, of_queries: bool, processes: Ranks) -> Rows:
        """What the columns of blocks of documents know about themselves, and those of blocks of queries."""
        queries, listed, *documents = processes.gather(self.queries, self.false_negatives, *self.documents)
        index = torch.arange(len(queries), device=queries.device)
        columns = {
            "document_id": torch.cat(documents),
            "document_query": queries.repeat(len(documents)),
            "document_query_index": index.repeat(len(documents)),
        }
        if of_queries:
            columns |= {"query_id": queries, "query_id_index": index, "query_document": documents[0]}
            columns |= {"query_false_negatives": listed}
        return columns


def make_ids(
    n: int,
    lists: int,
    processes: Ranks,
    device: torch.device,
    query_ids: Tensor | None,  # (N,)
    document_ids: Tensor | None,  # (N,), or (N, lists)
    false_negatives: Tensor | None,  # (N, K)
) -> Ids | None:
    """What is not given has an id of its own. None: nothing is given."""
    if query_ids is None and document_ids is None and false_negatives is None:
        return None
    positions = torch.arange(lists * n, device=device).view(lists, n)
    positions = positions + (processes.index << 40)  # unlike any other process's
    queries = positions[0]
    if query_ids is not None:
        queries = checks.tensor("query_ids", query_ids, (n,), device=device, kind="integer").long()
    documents = positions
    if document_ids is not None:
        checks.tensor("document_ids", document_ids, device=device, kind="integer")
        if document_ids.dim() == 1:
            # Hard negatives without an id are documents of their own.
            own = checks.tensor("document_ids", document_ids, (n,)).long()
            documents = torch.cat([own[None], -2 - positions[1:]])
        else:
            documents = checks.tensor("document_ids", document_ids, (n, lists)).long().t()
    if false_negatives is None:
        return Ids(queries, documents, positions.new_empty(n, 0))
    false = checks.tensor("false_negatives", false_negatives, (n, "K"), device=device, kind="integer").long()
    if document_ids is None:  # positions in this process's own lists
        false = torch.where(false >= 0, false + positions[0, 0], false)
    return Ids(queries, documents, false)


def known_pairs(block: str, rows: Rows, columns: Rows) -> Tensor:  # (R, V)
    """Which candidates of a block are known to belong to the row: the same query, the same document, or listed."""
    query, document = ("document_query", "document_id") if block.endswith("doc") else ("query_id", "query_document")
    same_document = columns[document] == rows["document_id"][:, None]
    # One's own hard negatives share one's query and are none the less negatives.
    of_other_row = columns[query + "_index"] != rows["target"][:, None]
    known = same_document | ((columns[query] == rows["query_id"][:, None]) & of_other_row)
    if block == "doc_to_query":  # listed by the other query
        for ids in columns["query_false_negatives"].unbind(1):
            known = known | (ids == rows["document_id"][:, None])
        return known
    for ids in rows["false_negatives"].unbind(1):
        known = known | (columns[document] == ids[:, None])
    return known
