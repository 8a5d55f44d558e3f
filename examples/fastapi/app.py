"""An API that asks an LLM: in the request while it is well, or by a task that waits out an outage."""

import os

import httpx
from celery import Celery
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from resilient_tasks import BreakerOpenError, Resilience

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
LLM_URL = os.environ.get("SERVICE_URL", "http://localhost:8001/")

app = Celery("app", broker=BROKER_URL, backend=BROKER_URL)
resilience = Resilience(app)
# a 429 or 503 with Retry-After keeps it open for that long
llm = resilience.breaker("llm", slow_call_duration=10, max_open_duration=3600)

api = FastAPI()


class Text(BaseModel):
    """What is to be summarized."""

    text: str


@app.task(breaker=llm, acks_late=True, time_limit=120)
def summarize_later(text: str) -> str:
    """Ask the LLM; while its breaker is open the task waits in the broker."""
    answer = httpx.post(LLM_URL, json={"prompt": text}, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["text"])


@api.post("/summaries")
async def summarize(request: Text) -> dict[str, str]:
    """Ask the LLM now; 503 with ``Retry-After`` while its breaker is open."""
    async with llm.guard(), httpx.AsyncClient(timeout=30) as client:
        answer = await client.post(LLM_URL, json={"prompt": request.text})
        answer.raise_for_status()
        return {"summary": answer.json()["text"]}


@api.post("/summaries/later", status_code=202)
def order_summary(request: Text) -> dict[str, str]:
    """Have a worker ask the LLM, whenever it is well."""
    return {"id": summarize_later.delay(request.text).id}


@api.get("/summaries/{task_id}")
def read_summary(task_id: str) -> dict[str, str | None]:
    """Return the state of a task, and its summary once there is one."""
    result = app.AsyncResult(task_id)
    return {"state": result.state, "summary": result.result if result.successful() else None}


@api.exception_handler(BreakerOpenError)
async def refused(_: Request, error: BreakerOpenError) -> JSONResponse:
    """Answer when the client may come back; None: when an operator has reset the breaker."""
    seconds = 60 if error.retry_after is None else round(error.retry_after) + 1
    return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": str(seconds)})


@api.exception_handler(httpx.HTTPError)
async def failed(_: Request, error: httpx.HTTPError) -> JSONResponse:
    """Answer that the LLM has failed."""
    return JSONResponse({"error": type(error).__name__}, status_code=502)
