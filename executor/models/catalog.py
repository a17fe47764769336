"""What ``docs/models.md`` says about each family of ``registry.py``; ``scripts/models_table.py`` writes it.

Every family is compared with transformers on tiny models with random weights (``tests/models/test_families.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One family."""

    name: str
    architectures: tuple[str, ...]
    examples: tuple[str, ...]
    """Ids on the hub."""
    gguf: tuple[str, ...] = ()
    """``general.architecture`` of its GGUF files."""
    real_weights: str = ""
    """A model whose real weights tests compare too."""
    limits: str = ""


STATES = "recurrent layers"
ONE_RANK = {
    "BambaForCausalLM": STATES,
    "FalconH1ForCausalLM": STATES,
    "GraniteMoeHybridForCausalLM": STATES,
    "Mamba2ForCausalLM": STATES,
    "NemotronHForCausalLM": STATES,
    "Qwen3NextForCausalLM": STATES,
    "Qwen3_5ForCausalLM": STATES,
    "Qwen3_5MoeForCausalLM": STATES,
}
"""Architectures that several ranks cannot share, because of what. Nor can they share encoders."""
ONE_STAGE = {"Gemma4ForCausalLM": "layers that read what earlier ones have cached"}
"""Likewise, those that pipeline stages cannot share."""

RECURRENT = "speculation on CPUs alone; states of requests take up to half of the KV cache"
POOLING = "embeddings, scores and classification only"

CATALOG = (
    Entry("Arcee", ("ArceeForCausalLM",), ("arcee-ai/AFM-4.5B",), gguf=("arcee",)),
    Entry(
        "Bamba",
        ("BambaForCausalLM",),
        ("ibm-ai-platform/Bamba-9B-v2",),
        gguf=("granitehybrid",),
        limits=RECURRENT,
    ),
    Entry(
        "BERT, DistilBERT",
        ("BertModel", "DistilBertModel", "ColBERTModel"),
        ("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-small-en-v1.5", "cross-encoder/ms-marco-MiniLM-L6-v2"),
        limits=POOLING,
    ),
    Entry("BLOOM", ("BloomForCausalLM",), ("bigscience/bloom-560m", "bigscience/bloomz-1b1")),
    Entry(
        "CLIP, SigLIP",
        ("CLIPModel", "SiglipModel"),
        ("openai/clip-vit-base-patch32", "google/siglip-base-patch16-224"),
        limits="embeddings of texts and images only",
    ),
    Entry(
        "Cohere",
        ("CohereForCausalLM", "Cohere2ForCausalLM"),
        ("CohereLabs/c4ai-command-r-v01", "CohereLabs/c4ai-command-r7b-12-2024"),
        gguf=("cohere2", "command-r"),
    ),
    Entry(
        "DeepSeek, Kimi",
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V3", "moonshotai/Kimi-K2-Instruct"),
        gguf=("deepseek2",),
        limits="no KV cache in 8 bits",
    ),
    Entry("dots.llm1", ("Dots1ForCausalLM",), ("rednote-hilab/dots.llm1.inst",), gguf=("dots1",)),
    Entry(
        "ERNIE 4.5",
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5_MoeForCausalLM"),
        ("baidu/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-21B-A3B-PT"),
        gguf=("ernie4_5", "ernie4_5-moe"),
    ),
    Entry(
        "EXAONE 4",
        ("Exaone4ForCausalLM",),
        ("LGAI-EXAONE/EXAONE-4.0-1.2B", "LGAI-EXAONE/EXAONE-4.0-32B"),
        gguf=("exaone4",),
    ),
    Entry(
        "Falcon",
        ("FalconForCausalLM",),
        ("tiiuae/falcon-7b", "tiiuae/falcon-11B", "tiiuae/falcon-rw-1b"),
        gguf=("falcon",),
    ),
    Entry(
        "Falcon-H1",
        ("FalconH1ForCausalLM",),
        ("tiiuae/Falcon-H1-0.5B-Instruct", "tiiuae/Falcon-H1-7B-Instruct"),
        gguf=("falcon-h1",),
        limits=RECURRENT,
    ),
    Entry(
        "Gemma",
        ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        (
            "google/gemma-1.1-2b-it",
            "google/gemma-2-2b-it",
            "google/gemma-3-1b-it",
            "google/gemma-3-4b-it",
            "google/embeddinggemma-300m",
        ),
        gguf=("gemma", "gemma2", "gemma3"),
        limits="images: Gemma 3 alone",
    ),
    Entry(
        "Gemma 4",
        ("Gemma4ForCausalLM",),
        ("google/gemma-4-E2B-it", "google/gemma-4-26B-A4B-it"),
        gguf=("gemma4",),
        limits="text only",
    ),
    Entry(
        "GLM-4",
        ("GlmForCausalLM", "Glm4ForCausalLM"),
        ("THUDM/glm-4-9b-chat-hf", "THUDM/GLM-4-9B-0414"),
        gguf=("chatglm", "glm4"),
    ),
    Entry("GLM-4.5", ("Glm4MoeForCausalLM",), ("zai-org/GLM-4.5-Air", "zai-org/GLM-4.6"), gguf=("glm4moe",)),
    Entry(
        "GLM-4.7-Flash",
        ("Glm4MoeLiteForCausalLM",),
        ("zai-org/GLM-4.7-Flash",),
        gguf=("deepseek2",),
        limits="no KV cache in 8 bits",
    ),
    Entry("GPT-2", ("GPT2LMHeadModel",), ("openai-community/gpt2", "distilbert/distilgpt2"), gguf=("gpt2",)),
    Entry("GPT-J", ("GPTJForCausalLM",), ("EleutherAI/gpt-j-6b",)),
    Entry("GPT-NeoX", ("GPTNeoXForCausalLM",), ("EleutherAI/pythia-160m", "databricks/dolly-v2-3b"), gguf=("gptneox",)),
    Entry("gpt-oss", ("GptOssForCausalLM",), ("openai/gpt-oss-20b", "openai/gpt-oss-120b"), gguf=("gpt-oss",)),
    Entry(
        "Granite",
        (
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "GraniteMoeHybridForCausalLM",
        ),
        (
            "ibm-granite/granite-3.3-2b-instruct",
            "ibm-granite/granite-3.1-3b-a800m-instruct",
            "ibm-granite/granite-4.0-micro",
            "ibm-granite/granite-4.0-h-tiny",
        ),
        gguf=("granite", "granitehybrid", "granitemoe"),
        limits=f"H: {RECURRENT}",
    ),
    Entry(
        "GTE",
        ("NewModel", "GteModel"),
        ("Alibaba-NLP/gte-multilingual-base", "Alibaba-NLP/gte-multilingual-reranker-base"),
        limits=POOLING,
    ),
    Entry(
        "InternLM",
        ("InternLM2ForCausalLM", "InternLM3ForCausalLM"),
        ("internlm/internlm2_5-1_8b-chat", "internlm/internlm3-8b-instruct"),
        gguf=("internlm2", "llama"),
    ),
    Entry(
        "Jina Embeddings 3, ColBERT 2, Reranker 2",
        ("JinaEmbeddingsV3Model", "ColBERTJinaRobertaModel"),
        ("jinaai/jina-embeddings-v3", "jinaai/jina-colbert-v2", "jinaai/jina-reranker-v2-base-multilingual"),
        limits=POOLING,
    ),
    Entry(
        "LFM2",
        ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"),
        ("LiquidAI/LFM2-350M", "LiquidAI/LFM2-1.2B", "LiquidAI/LFM2-8B-A1B"),
        gguf=("lfm2", "lfm2moe"),
        limits="text only",
    ),
    Entry(
        "Llama",
        ("LlamaForCausalLM",),
        ("meta-llama/Llama-3.2-1B-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "01-ai/Yi-1.5-6B-Chat"),
        gguf=("llama",),
        real_weights="SmolLM2-135M",
    ),
    Entry(
        "Llama 4",
        ("Llama4ForCausalLM",),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct",),
        gguf=("llama4",),
        limits="text only",
    ),
    Entry(
        "Mamba-2", ("Mamba2ForCausalLM",), ("mistralai/Mamba-Codestral-7B-v0.1",), gguf=("mamba2",), limits=RECURRENT
    ),
    Entry(
        "MiniMax-M2",
        ("MiniMaxM2ForCausalLM",),
        ("MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M2.1"),
        gguf=("minimax-m2",),
    ),
    Entry(
        "Mistral",
        ("MistralForCausalLM", "Ministral3ForCausalLM"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Ministral-3-3B-Instruct-2512-BF16"),
        gguf=("llama", "mistral3"),
    ),
    Entry("Mixtral", ("MixtralForCausalLM",), ("mistralai/Mixtral-8x7B-Instruct-v0.1",), gguf=("llama",)),
    Entry(
        "ModernBERT",
        ("ModernBertModel", "ColBERTModernBertModel"),
        ("nomic-ai/modernbert-embed-base", "Alibaba-NLP/gte-reranker-modernbert-base"),
        limits=POOLING,
    ),
    Entry("MPNet", ("MPNetModel",), ("sentence-transformers/all-mpnet-base-v2",), limits=POOLING),
    Entry("MPT", ("MptForCausalLM",), ("mosaicml/mpt-7b", "mosaicml/mpt-7b-instruct")),
    Entry("Nemotron", ("NemotronForCausalLM",), ("nvidia/Minitron-4B-Base",), gguf=("nemotron",)),
    Entry(
        "Nemotron-H, Nemotron 3",
        ("NemotronHForCausalLM",),
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
        gguf=("nemotron_h", "nemotron_h_moe"),
        limits=RECURRENT,
    ),
    Entry(
        "Nomic Embed",
        ("NomicBertModel",),
        ("nomic-ai/nomic-embed-text-v1.5",),
        limits=f"{POOLING}; no experts (v2)",
    ),
    Entry(
        "OLMo",
        ("OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        ("allenai/OLMo-1B-hf", "allenai/OLMo-2-0425-1B-Instruct", "allenai/Olmo-3-7B-Instruct"),
        gguf=("olmo", "olmo2"),
    ),
    Entry("OLMoE", ("OlmoeForCausalLM",), ("allenai/OLMoE-1B-7B-0924-Instruct",), gguf=("olmoe",)),
    Entry("OPT", ("OPTForCausalLM",), ("facebook/opt-125m",)),
    Entry("Phi", ("PhiForCausalLM",), ("microsoft/phi-1_5", "microsoft/phi-2"), gguf=("phi2",)),
    Entry(
        "Phi-3, Phi-4",
        ("Phi3ForCausalLM",),
        ("microsoft/Phi-3.5-mini-instruct", "microsoft/phi-4", "microsoft/Phi-4-mini-instruct"),
        gguf=("phi3",),
        limits="`--max-model-len` decides between short and long LongRoPE factors",
    ),
    Entry(
        "Phi-3.5-MoE",
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        ("microsoft/Phi-3.5-MoE-instruct",),
        gguf=("phimoe",),
    ),
    Entry("Qwen2", ("Qwen2ForCausalLM",), ("Qwen/Qwen2.5-0.5B-Instruct",), gguf=("qwen2", "qwen2vl")),
    Entry("Qwen2-MoE", ("Qwen2MoeForCausalLM",), ("Qwen/Qwen1.5-MoE-A2.7B-Chat",), gguf=("qwen2moe",)),
    Entry("Qwen3", ("Qwen3ForCausalLM",), ("Qwen/Qwen3-0.6B",), gguf=("qwen3", "qwen3vl")),
    Entry(
        "Qwen3-MoE", ("Qwen3MoeForCausalLM",), ("Qwen/Qwen3-30B-A3B-Instruct-2507",), gguf=("qwen3moe", "qwen3vlmoe")
    ),
    Entry(
        "Qwen3-Next, Qwen3.5",
        ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-35B-A3B"),
        gguf=("qwen35", "qwen35moe", "qwen3next"),
        limits=RECURRENT,
    ),
    Entry(
        "RoBERTa, XLM-R",
        ("RobertaModel", "XLMRobertaModel", "CamembertModel", "BgeM3EmbeddingModel"),
        ("sentence-transformers/all-distilroberta-v1", "intfloat/multilingual-e5-large", "BAAI/bge-reranker-v2-m3"),
        limits=POOLING,
    ),
    Entry("Seed-OSS", ("SeedOssForCausalLM",), ("ByteDance-Seed/Seed-OSS-36B-Instruct",), gguf=("seed_oss",)),
    Entry("SmolLM3", ("SmolLM3ForCausalLM",), ("HuggingFaceTB/SmolLM3-3B",), gguf=("smollm3",)),
    Entry(
        "StableLM",
        ("StableLmForCausalLM",),
        ("stabilityai/stablelm-2-1_6b", "stabilityai/stablelm-3b-4e1t"),
        gguf=("stablelm",),
    ),
    Entry("StarCoder2", ("Starcoder2ForCausalLM",), ("bigcode/starcoder2-3b",), gguf=("starcoder2",)),
)
