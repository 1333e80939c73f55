"""Counters of a server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

# Seconds of an answer: from a question about an encoded image on a GPU to a gigapixel on a CPU.
BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class _CacheCounts:
    """What a cache has counted by itself."""

    def __init__(self, cache):
        self.cache = cache

    def collect(self):
        for name, what, counts in (
            ("made", "computed", self.cache.made),
            ("found", "taken from the cache", self.cache.found),
        ):
            family = CounterMetricFamily(f"uhr_bat_{name}", f"Images and selections that were {what}.", labels=["kind"])
            for kind, count in list(counts.items()):
                family.add_metric([kind], count)
            yield family


class Metrics:
    """Of one server.

    Attributes:
        requests: answered and refused requests, by status of HTTP.
        tokens: by kind, "prompt" with its images or "answer".
        seconds, first_seconds: from a request to the end and to the first piece of its answer.
    """

    def __init__(self, engine):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("uhr_bat_requests", "Requests for an answer.", ["status"], **own)
        self.tokens = Counter("uhr_bat_tokens", "Tokens of answered requests.", ["kind"], **own)
        self.seconds = Histogram("uhr_bat_seconds", "From a request to the end of its answer.", buckets=BUCKETS, **own)
        self.first_seconds = Histogram(
            "uhr_bat_first_token_seconds", "From a request to the first piece of its answer.", buckets=BUCKETS, **own
        )
        self.active = Gauge("uhr_bat_active_requests", "Requests that are being worked on.", **own)
        decoding = Gauge("uhr_bat_decoding_requests", "Answers that are being decoded.", **own)
        decoding.set_function(lambda: engine.decoder.running)
        kept = Gauge("uhr_bat_cache_bytes", "Bytes of encoded images and selections that are kept.", **own)
        kept.set_function(lambda: engine.front.cache.num_bytes)
        self.registry.register(_CacheCounts(engine.front.cache))

    def page(self) -> bytes:
        return generate_latest(self.registry)
