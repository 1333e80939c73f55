"""The benchmarks, one class each: how a sample is read, asked and scored."""

from .cdvqa import CDVQA
from .conversations import Conversations
from .earth_vqa import EarthVQA
from .geo_evidence import GeoEvidence
from .hr_bench import HRBench
from .levir_cc import LevirCC
from .lrs_vqa import LRSVQA
from .made_up_scenes import FORMS, MadeUpDates, MadeUpScenes
from .mme_realworld import MMERealWorldRS
from .own import Own
from .pascal_voc import PascalVOC
from .rshr_bench import RSHRBench, XHRBench
from .rsvqa import RSVQAHR, RSVQALR
from .suite import Suite
from .tree_bench import TreeBench
from .ultra_vr import UltraVR
from .vrsbench import VRSBenchVQA
from .xlrs_bench import XLRSBench

SUITES = {
    suite.name: suite
    for suite in (
        XLRSBench("xlrs-bench", ""),
        XLRSBench("xlrs-bench-lite", "lite"),
        MMERealWorldRS("mme-realworld-rs", ""),
        MMERealWorldRS("mme-realworld-rs-lite", "lite"),
        RSHRBench("rshr-bench"),
        XHRBench("xhr-bench"),
        GeoEvidence("geo-evidence"),
        UltraVR("ultra-vr"),
        LRSVQA("lrs-vqa"),
        HRBench("hr-bench"),
        TreeBench("tree-bench"),
        VRSBenchVQA("vrsbench-vqa"),
        RSVQALR("rsvqa-lr"),
        RSVQAHR("rsvqa-hr"),
        EarthVQA("earth-vqa"),
        CDVQA("cdvqa"),
        LevirCC("levir-cc"),
        Conversations("conversations"),
        Own("own"),
        PascalVOC("pascal-voc"),
        *map(MadeUpScenes, FORMS),
        MadeUpDates(),
    )
}

__all__ = ["SUITES", "Suite"]
