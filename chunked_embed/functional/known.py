"""Which candidates are known to be no negatives: ids of queries and documents, and what is listed for a query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..gather import Ranks
from .arguments import Rows

NOTHING = -1  # what lists of false negatives are padded with


class Ids(NamedTuple):
    """Of this process's queries, of their documents (the positives, then the lists of hard negatives), and of documents
    that are no negatives of a query."""

    queries: Tensor  # (N,)
    documents: Tensor  # (lists, N)
    false_negatives: Tensor  # (N, K)
    bare_negatives: bool = False  # hard negatives have no ids, and are like no other document
    shared: bool = False  # queries and documents have one numbering

    def rows(self) -> Rows:
        return {
            "query_id": self.queries,
            "document_id": self.documents[0],
            "false_negatives": self.false_negatives,
        }

    def columns(self, of_queries: bool, processes: Ranks) -> Rows:
        """What the columns of blocks of documents know about themselves and their row, and those of blocks of
        queries."""
        queries, listed, *documents = processes.gather(self.queries, self.false_negatives, *self.documents)
        index, lists = torch.arange(len(queries), device=queries.device), len(documents)
        columns = {
            "document_id": torch.cat(documents),
            "document_query": queries.repeat(lists),
            "document_query_index": index.repeat(lists),
        }
        if self.shared:
            columns |= {"document_own": documents[0].repeat(lists)}
        if self.bare_negatives:
            columns |= {"document_has_id": torch.arange(lists * len(queries), device=queries.device) < len(queries)}
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
    shared_ids: bool = False,
) -> Ids | None:
    """What is not given has an id of its own. None: nothing is given."""
    if shared_ids and (query_ids is None or document_ids is None):
        got = " and ".join("None" if ids is None else "a tensor" for ids in (query_ids, document_ids))
        raise ValueError(f"expected query_ids and document_ids with shared_ids=True, got {got}")
    if query_ids is None and document_ids is None and false_negatives is None:
        return None
    positions = torch.arange(lists * n, device=device).view(lists, n)
    positions = positions + (processes.index << 40)  # unlike any other process's
    queries = positions[0]
    if query_ids is not None:
        queries = checks.tensor("query_ids", query_ids, (n,), device=device, kind="integer").long()
    documents, bare = positions, False
    if document_ids is not None:
        checks.tensor("document_ids", document_ids, device=device, kind="integer")
        if document_ids.dim() == 1:
            documents = checks.tensor("document_ids", document_ids, (n,)).long().expand(lists, n)
            bare = lists > 1
        else:
            documents = checks.tensor("document_ids", document_ids, (n, lists)).long().t()
    if false_negatives is None:
        return Ids(queries, documents, positions.new_empty(n, 0), bare, shared_ids)
    false = checks.tensor("false_negatives", false_negatives, (n, "K"), device=device, kind="integer").long()
    if document_ids is None:  # positions in this process's own lists
        false = torch.where(false >= 0, false + positions[0, 0], false)
    return Ids(queries, documents, false, bare, shared_ids)


def known_pairs(block: str, rows: Rows, columns: Rows, shared_ids: bool = False) -> Tensor:  # (R, V)
    """Which candidates of a block are known to belong to the row: see :func:`.contrastive.info_nce`."""
    query, document = rows["query_id"][:, None], rows["document_id"][:, None]
    of_documents = block.endswith("doc")
    names = ("document_query", "document_id") if of_documents else ("query_id", "query_document")
    candidate_query, candidate_document = (columns[name] for name in names)
    known = candidate_document == document
    if shared_ids and block != "doc_to_query":
        known = known | (candidate_document == query)
    if shared_ids and block != "query_to_doc":
        of_document = candidate_query == document
        # A hard negative of that query is one of this document's, too.
        known = known | (of_document & (candidate_document == columns["document_own"]) if of_documents else of_document)
    if block == "doc_to_query":  # listed by the other query
        for ids in columns["query_false_negatives"].unbind(1):
            known = known | ((ids == document) & (ids != NOTHING))
    else:
        for ids in rows["false_negatives"][:, :, None].unbind(1):
            known = known | ((candidate_document == ids) & (ids != NOTHING))
    if of_documents and "document_has_id" in columns:
        known = known & columns["document_has_id"]
    # One's own hard negatives share one's query and are none the less negatives.
    return known | ((candidate_query == query) & (columns[names[0] + "_index"] != rows["target"][:, None]))
