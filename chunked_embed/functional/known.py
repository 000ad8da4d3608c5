"""Which candidates are known to be no negatives: ids of queries and documents, and what is listed for a query."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..gather import Ranks
from .arguments import Rows

NOTHING = -1  # what lists of false negatives are padded with


class Ids(NamedTuple):
    """Of this process's queries, of their documents (the positives, then the lists of hard negatives), and of documents
    that are no negatives of a query. None: not given, and each is like no other."""

    queries: Tensor | None  # (N,)
    documents: Tensor | None  # (lists, N); there where false negatives are
    false_negatives: Tensor | None  # (N, K)
    bare_negatives: bool = False  # hard negatives have no ids, and are like no other document
    shared: bool = False  # queries and documents have one numbering

    def rows(self) -> Rows:
        documents = None if self.documents is None else self.documents[0]
        rows = {"query_id": self.queries, "document_id": documents, "false_negatives": self.false_negatives}
        return {name: ids for name, ids in rows.items() if ids is not None}

    def columns(self, lists: int, of_queries: bool, processes: Ranks) -> Rows:
        """What the columns of blocks of documents know about themselves and their row, and those of blocks of
        queries."""
        columns: Rows = {}
        if self.queries is not None:
            (queries,) = processes.gather(self.queries)
            index = torch.arange(len(queries), device=queries.device)
            columns |= {"document_query": queries.repeat(lists), "document_query_index": index.repeat(lists)}
            if of_queries:
                columns |= {"query_id": queries, "query_id_index": index}
        if self.documents is not None:
            documents = processes.gather(*self.documents)
            columns |= {"document_id": torch.cat(documents)}
            if self.shared:
                columns |= {"document_own": documents[0].repeat(lists)}
            if self.bare_negatives:
                n = len(documents[0])
                columns |= {"document_has_id": torch.arange(lists * n, device=documents[0].device) < n}
            if of_queries:
                columns |= {"query_document": documents[0]}
        if self.false_negatives is not None and of_queries:
            (columns["query_false_negatives"],) = processes.gather(self.false_negatives)
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
    """None: nothing is given."""
    if shared_ids and (query_ids is None or document_ids is None):
        got = " and ".join("None" if ids is None else "a tensor" for ids in (query_ids, document_ids))
        raise ValueError(f"expected query_ids and document_ids with shared_ids=True, got {got}")
    if query_ids is None and document_ids is None and false_negatives is None:
        return None
    queries, documents, bare = None, None, False
    if query_ids is not None:
        queries = checks.tensor("query_ids", query_ids, (n,), device=device, kind="integer").long()
    if document_ids is not None:
        checks.tensor("document_ids", document_ids, device=device, kind="integer")
        if document_ids.dim() == 1:
            documents = checks.tensor("document_ids", document_ids, (n,)).long().expand(lists, n)
            bare = lists > 1
        else:
            documents = checks.tensor("document_ids", document_ids, (n, lists)).long().t()
    if false_negatives is None:
        return Ids(queries, documents, None, bare, shared_ids)
    false = checks.tensor("false_negatives", false_negatives, (n, "K"), device=device, kind="integer").long()
    if documents is None:  # positions in this process's own lists
        first = processes.index << 40  # unlike any other process's
        documents = torch.arange(first, first + lists * n, device=device).view(lists, n)
        false = torch.where(false >= 0, false + first, false)
    return Ids(queries, documents, false, bare, shared_ids)


def known_pairs(block: str, rows: Rows, columns: Rows, shared_ids: bool = False) -> Tensor:  # (R, V)
    """Which candidates of a block are known to belong to the row: see :func:`.contrastive.info_nce`."""
    of_documents = block.endswith("doc")
    names = ("document_query", "document_id") if of_documents else ("query_id", "query_document")
    found: list[Tensor] = []
    if "document_id" in rows:
        document, candidate_document = rows["document_id"][:, None], columns[names[1]]
        found.append(candidate_document == document)
        if shared_ids and block != "doc_to_query":
            found.append(candidate_document == rows["query_id"][:, None])
        if shared_ids and block != "query_to_doc":
            of_document = columns[names[0]] == document
            if of_documents:  # a hard negative of that query is one of this document's, too
                of_document = of_document & (candidate_document == columns["document_own"])
            found.append(of_document)
        if "false_negatives" in rows and block == "doc_to_query":  # listed by the other query
            listed = columns["query_false_negatives"].unbind(1)
            found += [(ids == document) & (ids != NOTHING) for ids in listed]
        elif "false_negatives" in rows:
            listed = rows["false_negatives"][:, :, None].unbind(1)
            found += [(candidate_document == ids) & (ids != NOTHING) for ids in listed]
    if of_documents and "document_has_id" in columns:
        found = [known & columns["document_has_id"] for known in found]
    if "query_id" in rows:  # one's own hard negatives share one's query and are none the less negatives
        is_query = columns[names[0]] == rows["query_id"][:, None]
        found.append(is_query & (columns[names[0] + "_index"] != rows["target"][:, None]))
    return reduce(torch.logical_or, found)
