# SPDX-License-Identifier: Apache-2.0
"""One vLLM on the CPU that takes orders as JSON lines on stdin and answers on stdout.

    python vllm_instance.py MODEL '{"block_size": 64, "kv_transfer_config": {...}}'

Orders: {"add": ID, "prompt": [...], "max_tokens": N, "kv_transfer_params": {...}}, {"abort": ID}, {"status": ID}.
Answers: {"ready": true}, {"finished": ID, "tokens": [...], "kv_transfer_params": ...}, {"aborted": ID}, {"status": ID,
"blocks": blocks in use, "computed": tokens computed so far}.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_ENABLE_V1_MULTIPROCESSING="0"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever prints, it is no answer


def answer(**event: Any) -> None:
    print(json.dumps({**event, "at": time.time()}), file=answers, flush=True)


def main() -> None:
    logging.basicConfig()
    logging.getLogger("kvferry.vllm").setLevel(logging.INFO)
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    defaults = {
        "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 1024,
        "max_num_seqs": 8, "enable_prefix_caching": False,
    }  # fmt: skip
    engine = LLMEngine.from_engine_args(EngineArgs(model=sys.argv[1], **{**defaults, **json.loads(sys.argv[2])}))
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    all_free = pool.get_num_free_blocks()
    computed = 0
    schedule = scheduler.schedule

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal computed
        scheduled = schedule(*arguments, **keywords)
        computed += scheduled.total_num_scheduled_tokens
        return scheduled

    scheduler.schedule = counting
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    answer(ready=True)
    while True:
        busy = engine.has_unfinished_requests() or scheduler.has_requests()
        try:
            # A prefilling instance that keeps blocks steps without pause; here it leaves some time to the others.
            order = orders.get(timeout=0.001) if busy else orders.get()
        except queue.Empty:
            order = {}
        if order is None:
            break
        if "add" in order:
            sampling = SamplingParams(
                temperature=0, max_tokens=order["max_tokens"], ignore_eos=True, detokenize=False,
                extra_args={"kv_transfer_params": order.get("kv_transfer_params")},
            )  # fmt: skip
            engine.add_request(order["add"], {"prompt_token_ids": order["prompt"]}, sampling)
        elif "abort" in order:
            engine.abort_request([order["abort"]])
            answer(aborted=order["abort"])
        elif "status" in order:
            answer(status=order["status"], blocks=all_free - pool.get_num_free_blocks(), computed=computed)
        if order:
            continue  # all orders first
        for output in engine.step():
            if output.finished:
                answer(
                    finished=output.request_id,
                    tokens=list(output.outputs[0].token_ids),
                    reason=output.outputs[0].finish_reason,
                    kv_transfer_params=getattr(output, "kv_transfer_params", None),
                )
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
