"""Every key of a config, with its unit: configs start from this one and change what their experiment needs.

Recipe: QLoRA (Dettmers et al., 2023), section 5 and appendix B; sizes up to 13B.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.model = ConfigDict()
    c.model.path = ""  # folder of a Hugging Face checkpoint, or a hub name; must be given
    c.model.revision = "main"  # branch, tag or commit of a hub name
    c.model.compute_dtype = "bfloat16"  # bfloat16 | float32; norms, softmax and the loss are float32 always
    # what of a layer is kept for the backward pass: block: its input, and the rest is computed again | selective: also
    # q, k, v, attention's output, the sum after it, gate and up, so that no product with a frozen weight is computed
    # again (7B: 3 MB a token, 11 times block's) | block+offload: block, its inputs in pinned host memory until they are
    # needed | none: all that JAX keeps | auto: the fastest of selective, block and block+offload that fits the device
    # together with train.grad_accum; block on devices that state no memory limit (CPUs)
    c.model.remat = "block"
    c.model.attention = "auto"  # xla: all scores at once | chunked: never all, for long sequences | flash: none in
    # memory (a kernel; NVIDIA GPUs from Ampere on, 16 bits) | cudnn (cuDNN's; NVIDIA GPUs only) | auto: flash where it
    # was measured to be faster on this GPU, else xla up to 2,048 tokens and chunked above
    c.model.sequence_chunk = 0  # tokens that go through a layer at a time, for sequences far beyond the card; 0 is off.
    # A chunk dequantizes every weight: by an H200's rates a third of a layer's time at 1024 tokens, a tenth at 4096
    c.model.router_aux_loss_coef = 0.0  # of mixtures: so much of the loss that asks for evenly used experts is added to
    # each target token's (transformers adds it where output_router_logits is true: 0.001 to 0.02); 0 is none. Over a
    # micro-batch's tokens up to each row's last target

    # of the 4-bit matmul: auto (the fastest in the GPU's tuned table; xla where nothing was measured) | xla (first
    # dequantizes) | scratch (the same, with a kernel; NVIDIA GPUs from Ampere on) | triton (those GPUs: decodes inside
    # the product for up to 16 rows, as in generation; training and all else goes the way of scratch) | mosaic (Hopper:
    # decodes inside every product). Measured on an H200 alone (results/README.md)
    c.model.kernel = "auto"

    c.quant = ConfigDict()
    # nf4 | fp4 (the paper's E2M1) | int4 | fp4-e3m0 | int8 (LLM.int8(): a scale a row, activations in 8 bits too but
    # for outliers; it reads neither of the two keys below) | none (16-bit base)
    c.quant.format = "nf4"
    c.quant.block_size = 64  # weights that share one scale; a power of two, 32 to 4096
    c.quant.double_quant = True  # scales in 8 bits: 4.127 bits a weight instead of 4.5

    c.lora = ConfigDict()
    c.lora.rank = 64
    c.lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank
    c.lora.dropout = 0.1  # probability; 0.05 for 33B and larger
    c.lora.targets = ("all-linear",)  # "all-linear", names ("q_proj", ...), or regular expressions over full names
    c.lora.use_rslora = False  # scale by alpha / sqrt(rank) instead
    # what trains whole beside the adapters, in float32 (PEFT's modules_to_save): embed_tokens, lm_head; auto: both if
    # tokens are added, else none; (): none, new tokens' rows then stay at the mean. V * D parameters each (once where
    # they are tied), 16 bytes a parameter with Adam: weight, gradient, two moments
    c.lora.modules_to_save = ("auto",)
    c.lora.init_from = ""  # PEFT folder to start from; "" starts at zero effect (B = 0)

    c.data = ConfigDict()
    # file (.json .jsonl .csv .tsv .parquet, also .gz), hub data set (owner/name, owner/name:file, or with a pattern as
    # owner/name:data/*.parquet), or one known by name: oasst1 | hh-rlhf | alpaca | alpaca-clean |
    # unnatural-instructions | chip2 | longform | dolly (data/known.py). Several as a tuple, or with commas between them
    c.data.path = FieldReference("", field_type=object)
    c.data.revision = "main"
    # alpaca | input-output | oasst1 | hh-rlhf | self-instruct | unnatural-instructions | flan-v2 | chip2 | longform |
    # dolly | messages (OpenAI's chats) | sharegpt | prompt-completion | preference (chosen is learned, rejected is not
    # used) | super-natural-instructions (its owners' list of tasks: a hundred instances of each) | text (all of it is
    # learned) | auto (found from the first rows: the one format that reads them all). One for all data sets, or one for
    # each, as a tuple or with commas
    c.data.format = FieldReference("alpaca", field_type=object)
    # glue: rows with labels, for encoders (RoBERTa) alone, and never found: it must be said
    c.data.task = ""  # of glue: cola | sst2 | mrpc | qqp | stsb | mnli | qnli | rte | wnli; "": as a folder or file of
    # data.path is called
    # shares of several data sets in the examples that are drawn, as (0.7, 0.3): an epoch has as many examples as all
    # sets together, that share of them of each. A set that has fewer repeats them, all equally often; one that has more
    # goes on with the others in the next epoch. (): every example of every set once an epoch
    c.data.weights = ()
    c.data.template = "auto"  # the text around what a row says: paper (the prompt of its format: Alpaca's, Guanaco's
    # conversation, ...) | chat (the model's own chat template, for every format; the assistant's turns are learned,
    # each with the token that ends it) | auto: chat for rows of messages if the model has a template, else paper
    c.data.turns = "all"  # which answers of a chat are learned, in a chat template: all | last (of those that may be)
    c.data.template_date = "2024-07-26"  # YYYY-MM-DD, the day that chat templates write as today's, so that a run that
    # goes on another day has the same tokens
    c.data.batches = ""  # int32 .npy file [n, B, T] instead of a data set; labels are the inputs shifted
    # texts that become tokens wherever they stand in the data, as "<think>"; rows for them start at the mean of the
    # others. The tokenizer with them, and with a pad token that is not EOS, is saved beside the adapter
    c.data.added_tokens = ()
    c.data.added_special_tokens = ()  # the same for control tokens, as "<|im_start|>": chat templates write them, their
    # letters in a text stay letters (not those of signs around thinking in what a chat's assistant says)
    # Tokens of the prompt, BOS included, and of the answer, EOS included. What is longer is cut, and a cut answer is
    # learned without an end. 0 takes them as long as they are: then the model's context is what both together may have.
    # A chat in a chat template has room for both lengths together, or for the context; a longer one ends after the last
    # answer that fits. Memory grows with the longest row, which comes first; a run's report names it
    c.data.max_source_len = 0
    c.data.max_target_len = 0
    c.data.train_on_source = False  # also learn the prompt (chat template: all tokens but the first)
    c.data.group_by_length = True  # batches of similar lengths: less padding
    c.data.pad_to_multiple_of = 64  # tokens; bounds the number of compiled shapes (above 1,024 tokens steps are longer:
    # eight for each doubling)
    c.data.packing = False  # several examples in each row (first-fit), which do not see each other: one compiled shape,
    # hardly any padding; train.batch_size then counts rows, group_by_length does nothing. Not with attention = cudnn
    c.data.pack_length = 0  # tokens of a packed row; 0 is max_source_len + max_target_len, or the longest example where
    # one of them is 0, rounded up as above
    c.data.max_examples = 0  # the first of each data set; 0 takes all
    c.data.max_rows = 0  # rows of each data set that are read at all; 0 reads them to the end
    # a hub data set is fetched, tokenized and deleted file by file: the disk holds one file and the tokens (5 bytes
    # each). All of it, or max_rows, is read before the first step
    c.data.streaming = False
    # files of held-out examples, named as in path and of the same format; "" holds out a seeded split of the data
    c.data.eval_path = FieldReference("", field_type=object)
    c.data.eval_examples = 100  # examples held out; 0 holds out none of a split, and takes all of eval_path
    c.data.seed = 0  # of the split and the order

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | lion | adamw8bit | lion8bit (8-bit state), these four also as paged_NAME
    # (NAME with paging = always) | sgd. lion wants beta2 = 0.99 and a learning rate 3 to 10 times lower
    c.optimizer.learning_rate = 2e-4  # 1e-4 for 33B and larger
    c.optimizer.schedule = "constant"  # constant | linear | cosine, the last two to zero at the last step
    c.optimizer.warmup_steps = 0  # steps of linear rise from 0, before the schedule
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.max_grad_norm = 0.3  # global norm; 0 does not clip
    c.optimizer.paging = "auto"  # which pages of the state live in host memory, and on the device for their update
    # alone: never any | always all | auto: those that do not fit beside the largest program of the run
    c.optimizer.page_bytes = 64 * 2**20  # state a page, of which up to three are on the device; one layer at least

    c.train = ConfigDict()
    c.train.steps = 1875  # optimizer steps
    c.train.batch_size = 16  # sequences an optimizer step, micro-batches together
    # micro-batches that a step's sequences are cut into, equally many in each; or auto: as few as fit the device, with
    # model.remat (what is chosen is printed, and kept by a run that goes on). No cut changes a step but by rounding. On
    # devices that state no memory limit auto makes micro-batches of 2,048 tokens at most, or of one sequence
    c.train.grad_accum = FieldReference(16, field_type=object)
    c.train.loss_chunk = 1024  # tokens whose logits exist at a time; of target tokens alone
    c.train.checkpoint_every = 100  # steps
    c.train.keep_checkpoints = 2  # the newest that stay on disk; where one is found damaged a run goes on from the one
    # before, which 1 has not
    c.train.log_every = 1  # steps
    c.train.loggers = ()  # where metrics go beside metrics.jsonl: any of tensorboard, wandb, mlflow, each an extra
    c.train.seed = 0  # of adapter initialisation and dropout

    c.mesh = ConfigDict()
    c.mesh.devices = 1  # of this run; 1 leaves it to the axes, whose product it is
    c.mesh.data = 1  # devices, or groups of fsdp, that divide a batch's rows among them; each holds the whole model
    c.mesh.fsdp = 0  # devices that divide rows and the model's arrays; 0: those that the others leave of mesh.devices
    c.mesh.tensor = 1  # devices that divide each product: heads, and the feed-forward's width. They have the same rows
    c.mesh.expert = 1  # devices that divide rows and arrays too, but keep a mixture's experts; tokens travel to them
    c.mesh.sequence = 1  # devices that divide the tokens of each row, and arrays as fsdp does; keys and values travel

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between evaluations of the held-out split; 0 evaluates at the end only,
    # others also before the first step
    c.eval.batch_size = 4  # sequences; the longest come first
    c.eval.mmlu_data = ""  # MMLU: the owners' folder, a hub data set (cais/mmlu) or a file of questions; "" asks none
    c.eval.mmlu_split = "val"  # val | test | dev
    c.eval.mmlu_shots = 5  # example questions before each
    c.eval.mmlu_questions = 0  # questions asked, drawn by data.seed; 0 asks all
    c.eval.mmlu_every = 0  # steps between evaluations; 0 evaluates at the end only, others also before the first step
    c.eval.mmlu_batch_size = (
        1  # prompts asked together; 5-shot ones have some 700 tokens, and up to the model's context
    )

    return c.lock()
