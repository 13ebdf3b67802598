# SPDX-License-Identifier: Apache-2.0
"""The class that vLLM makes, once in the scheduler and once in each worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from .layout import Field, KvLayout, check_spec
from .messages import Server
from .options import Options
from .push_scheduler import PushScheduler
from .push_worker import PushWorker
from .scheduler import Scheduler, Step
from .worker import Worker

__all__ = ["KvferryConnector"]


@dataclass
class _Orders(KVConnectorMetadata):
    step: Step


@dataclass
class _WorkerAddress(KVConnectorHandshakeMetadata):
    server: Server


class KvferryConnector(KVConnectorBase_V1):
    """Hands the KV caches of prompts from prefilling to decoding instances. The decoding instance reads, or the
    prefilling one writes, layer by layer.

    ``kv_role`` is "kv_producer" for a prefilling instance, "kv_consumer" for a decoding one, or, where nothing is pushed,
    "kv_both". For ``kv_connector_extra_config`` see ``kvferry.vllm.options.Options``.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, parallel = self._kv_transfer_config, vllm_config.parallel_config
        self._options = Options.from_config(transfer.kv_connector_extra_config)
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise ValueError(f"KvferryConnector does not support {name} above 1")
        self._pushes = self._options.mode == "push"
        replicas = getattr(parallel, "data_parallel_size", 1)
        self._options.check_role(transfer.is_kv_producer, transfer.is_kv_consumer, replicas)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._tensors: list[torch.Tensor] = []
        if role == KVConnectorRole.SCHEDULER:
            block_size = vllm_config.cache_config.block_size
            if self._pushes:
                self._scheduler = PushScheduler(self._options, block_size, transfer.is_kv_producer)
            else:
                self._scheduler = Scheduler(self._options, block_size)

    # In the scheduler

    def _scheduling(self) -> Scheduler:
        assert self._scheduler is not None, "called in a worker"
        return self._scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        workers = {}
        for rank, worker in metadata.items():
            assert isinstance(worker, _WorkerAddress)
            workers[rank] = worker.server
        self._scheduling().set_workers(workers)

    def on_new_request(self, request: Any) -> None:
        self._scheduling().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return self._scheduling().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return _Orders(self._scheduling().next_step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduling().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling().request_finished(request, block_ids)

    # In a worker

    def _working(self) -> Worker:
        assert self._worker is not None, "called in the scheduler, or before register_kv_caches"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layout, memory = self._describe(kv_caches)
        self._tensors = list(kv_caches.values())  # the memory stays for as long as the channel
        transfer = self._kv_transfer_config
        self._worker = (PushWorker if self._pushes else Worker)(
            self._options, transfer.engine_id, layout, memory, transfer.is_kv_producer, transfer.is_kv_consumer
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return _WorkerAddress(self._working().server)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Copies of blocks are made after this, and before the step's orders are bound."""
        assert isinstance(kv_connector_metadata, _Orders)
        if isinstance(self._worker, PushWorker):
            self._worker.lost(kv_connector_metadata.step)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._working().begin(self._orders())

    def _orders(self) -> Step:
        orders = self._get_connector_metadata()
        assert isinstance(orders, _Orders)
        return orders.step

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._working().step(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests are scheduled once they are loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pushes what the step has computed of a layer. What is read stays where it is."""
        if isinstance(self._worker, PushWorker):
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        """Blocks stay as they are until they have been pushed or read, so there is nothing to wait for."""
        if isinstance(self._worker, PushWorker):
            self._worker.step_computed()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("mode") == "push"

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        sent, received = self._working().finished()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._working().failed_blocks()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
            self._tensors = []

    def _describe(self, kv_caches: dict[str, torch.Tensor]) -> tuple[KvLayout, list[tuple[int, int]]]:
        """How the tensors lie, and the memory that they lie in.

        vLLM's tensors are [blocks, heads, tokens, content], in whatever order of strides.
        """
        config, model = self._vllm_config, self._vllm_config.model_config
        [group] = self._kv_cache_config.kv_cache_groups
        check_spec(group.kv_cache_spec)
        first = next(iter(kv_caches.values()))
        if first.device.type != "cpu":
            raise ValueError(f"KvferryConnector moves KV caches in host memory, and this one is on {first.device}")
        memory: dict[int, int] = {}
        layers = []
        for name, tensor in kv_caches.items():
            if (tensor.shape, tensor.stride(), tensor.dtype) != (first.shape, first.stride(), first.dtype):
                raise ValueError("KvferryConnector supports models whose layers all have the same kind of KV cache")
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            layers.append((name, list(memory).index(storage.data_ptr()), tensor.data_ptr() - storage.data_ptr()))
        if first.dim() == 3:  # one head, of latent vectors
            first = first.unsqueeze(1)
        blocks, heads, tokens, content = first.shape
        item = first.element_size()
        block_stride, head_stride, token_stride, content_stride = (step * item for step in first.stride())
        if content_stride != item:
            raise ValueError(f"KvferryConnector does not support a KV cache with strides {first.stride()}")
        kind = [self._options.model_id or model.model, str(first.dtype), str(config.cache_config.cache_dtype)]
        fields: tuple[Field, ...]
        if model.use_mla:
            run_tokens, fields = 1, (Field(0, 1, 0, content * item, token_stride),)
        else:
            # The CPU's kernels pack a head's bytes as their instructions want, keys first. What isn't known stays whole.
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

            packing = _get_attn_isa(first.dtype, tokens, content // 2, config.cache_config.cache_dtype)
            kind.append(packing)
            half = content * item // 2
            if packing == "vec":  # of keys, all tokens' first numbers, then their second ones, ...
                keys = Field(0, content // 2, tokens * item, item, item)
                run_tokens, fields = 1, (keys, Field(tokens * half, 1, 0, half, half))
            else:
                run_tokens, fields = tokens, (Field(0, 1, 0, 2 * tokens * half, 2 * tokens * half),)
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        layout = KvLayout(
            kind="; ".join(kind),
            layers=tuple(layers),
            num_blocks=blocks,
            blocks_per_id=group.kv_cache_spec.block_size // tokens,
            block_tokens=tokens,
            block_stride=block_stride,
            heads=heads,
            head_stride=head_stride,
            run_tokens=run_tokens,
            fields=fields,
            total_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
            tp_rank=get_tensor_model_parallel_rank(),
            tp_size=config.parallel_config.tensor_parallel_size,
        )
        return layout, list(memory.items())
