// A guard on a device, without Python: loads a bundle and a quantised chat model, answers a prompt, and prints the
// guard's verdict on the prompt and on the answer. build.sh builds it against libllama.
//
//     ./guard BUNDLE MODEL.gguf "How do I bake bread?" ["system message"]
//
// It is written for activated adapters and chat models that speak ChatML, such as the default one.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama.h"

enum { CHAT, GUARD, SEQUENCES, CONTEXT = 2048, ANSWER = 64, THREADS = 2 };

static const char * SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

static void fail(const char * what, const char * where) {
    fprintf(stderr, "error: %s: %s\n", what, where);
    exit(1);
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

// The whole file with a zero behind it.
static char * read_file(const char * folder, const char * name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE * file = fopen(path, "rb");
    if (!file) fail("cannot be read", path);
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    rewind(file);
    char * data = malloc(size + 1);
    if (!data || fread(data, 1, size, file) != (size_t) size) fail("cannot be read", path);
    data[size] = 0;
    fclose(file);
    return data;
}

// What follows a key of JSON; keys are looked for in the order in which guard.json is written.
static const char * behind(const char * json, const char * key) {
    const char * place = strstr(json, key);
    if (!place) fail("guard.json lacks a field", key);
    return place + strlen(key);
}

typedef struct {
    double temperature, bias, threshold;
} Calibrator;

// How harmfulness is decided on a target, with the threshold of the guard's default policy.
static Calibrator calibrator(const char * spec, const char * target) {
    char policy[64] = "\"", key[64];
    const char * calibration = behind(spec, "\"calibration\": {");
    if (sscanf(behind(calibration, "\"default_policy\": \""), "%60[^\"]", policy + 1) != 1) fail("has no policy", spec);
    strcat(policy, "\":");
    snprintf(key, sizeof key, "\"%s\": {", target);
    const char * head = behind(behind(calibration, key), "\"harmful\": {");
    const char * thresholds = behind(head, "\"thresholds\": {");
    return (Calibrator){
        .temperature = atof(behind(head, "\"temperature\":")),
        .bias = atof(behind(head, "\"bias\":")),
        .threshold = atof(behind(thresholds, policy)),
    };
}

// The first row of a tensor of heads.safetensors: an 8-byte length, a JSON header, then the data.
static const float * tensor(const char * file, const char * name) {
    unsigned long long length, begin;
    memcpy(&length, file, sizeof length);
    const char * place = strstr(file + 8, name);
    place = place ? strstr(place, "\"data_offsets\":[") : NULL;
    if (!place || sscanf(place, "\"data_offsets\":[%llu", &begin) != 1) return NULL;
    return (const float *) (file + 8 + length + begin);
}

typedef struct {
    struct llama_context * context;
    const struct llama_vocab * vocabulary;
    struct llama_adapter_lora * adapter;
    const llama_token * invocation;
    int invoked, hidden, position;
    const float *weight, *bias, *token_weight;
    int weighed_tokens;
    const char * spec;
} Guarded;

// Reads tokens of a sequence from a position on; the last of them gives logits, with `features` all give features.
static void decode(const Guarded * g, int sequence, int position, const llama_token * ids, int count, int features) {
    struct llama_batch batch = llama_batch_init(count, 0, 1);
    for (batch.n_tokens = 0; batch.n_tokens < count; batch.n_tokens++) {
        const int i = batch.n_tokens;
        batch.token[i] = ids[i];
        batch.pos[i] = position + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = features || i == count - 1;
    }
    llama_set_embeddings(g->context, features);
    if (llama_decode(g->context, batch)) fail("cannot be read", "the context is full");
    llama_batch_free(batch);
}

// Extends the chat by a text. Control tokens are parsed in template text only: a user cannot write one.
static void say(Guarded * g, const char * text, int is_template) {
    llama_token ids[CONTEXT];
    const int count = llama_tokenize(g->vocabulary, text, strlen(text), ids, CONTEXT, false, is_template);
    if (count < 0) fail("is too long", "the text");
    if (count == 0) return;
    decode(g, CHAT, g->position, ids, count, 0);
    g->position += count;
}

// What the token head adds to a prompt's logit: its different tokens' weights, over the root of their number. The library
// takes disguises off the text before (normalise.py); this program does not.
static double of_words(const Guarded * g, const char * prompt) {
    llama_token ids[CONTEXT];
    const int count = llama_tokenize(g->vocabulary, prompt, strlen(prompt), ids, CONTEXT, false, false);
    double sum = 0;
    int different = 0;
    for (int i = 0; g->token_weight && i < count; i++) {
        int seen = 0;
        for (int j = 0; j < i && !seen; j++) seen = ids[j] == ids[i];
        different += !seen;
        if (!seen && ids[i] < g->weighed_tokens) sum += g->token_weight[ids[i]];
    }
    return different ? sum / sqrt(different) : 0;
}

// The guard path: the invocation is read with the adapter on, in a sequence that shares the chat's cells.
static void judge(const Guarded * g, const char * target, double words) {
    llama_memory_t memory = llama_get_memory(g->context);
    struct llama_adapter_lora * adapters[] = {g->adapter};
    float scales[] = {1.0f};
    llama_memory_seq_cp(memory, CHAT, GUARD, 0, g->position);
    llama_set_adapters_lora(g->context, adapters, 1, scales);
    decode(g, GUARD, g->position, g->invocation, g->invoked, 1);
    const float * features = llama_get_embeddings_ith(g->context, -1);
    double logit = words + (g->bias ? g->bias[0] : 0.0);
    for (int i = 0; i < g->hidden; i++) logit += (double) g->weight[i] * features[i];
    llama_set_adapters_lora(g->context, NULL, 0, NULL);
    llama_memory_seq_rm(memory, GUARD, -1, -1);
    const Calibrator c = calibrator(g->spec, target);
    const double score = fmin(1 / (1 + exp(-(logit / c.temperature + c.bias))), nextafter(1, 0));  // 1 flags nothing
    printf("%s: %s %.4f against %.4f\n", target, score >= c.threshold ? "flagged" : "ok", score, c.threshold);
}

// Answers greedily; the logits are those behind the last token read.
static void answer(Guarded * g) {
    const int words = llama_vocab_n_tokens(g->vocabulary);
    for (int step = 0; step < ANSWER && g->position + g->invoked < CONTEXT; step++) {
        const float * logits = llama_get_logits_ith(g->context, -1);
        llama_token best = 0;
        for (int i = 1; i < words; i++) {
            if (logits[i] > logits[best]) best = i;
        }
        if (llama_vocab_is_eog(g->vocabulary, best)) break;
        char piece[256];
        const int size = llama_token_to_piece(g->vocabulary, best, piece, sizeof piece, 0, false);
        if (size > 0) fwrite(piece, 1, size, stdout);
        decode(g, CHAT, g->position++, &best, 1, 0);
    }
    putchar('\n');
}

int main(int count, char ** words) {
    if (count < 4) fail("usage", "guard BUNDLE MODEL.gguf PROMPT [SYSTEM]");
    llama_log_set(quiet, NULL);
    struct llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts = false;  // the weights stay mapped, with no repacked copy
    struct llama_model * model = llama_model_load_from_file(words[2], model_params);
    if (!model) fail("cannot be loaded", words[2]);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = CONTEXT;
    params.n_seq_max = SEQUENCES;
    params.kv_unified = true;  // or the sequences would not share cells
    params.pooling_type = LLAMA_POOLING_TYPE_NONE;
    params.n_threads = params.n_threads_batch = THREADS;

    char path[4096];
    snprintf(path, sizeof path, "%s/adapter.gguf", words[1]);
    char * spec = read_file(words[1], "guard.json");
    char * heads = read_file(words[1], "heads.safetensors");
    if (strncmp(behind(behind(spec, "\"heads\": {"), "\"harmful\": "), "true", 4)) fail("has categories alone", words[1]);
    Guarded g = {
        .context = llama_init_from_model(model, params),
        .vocabulary = llama_model_get_vocab(model),
        .adapter = llama_adapter_lora_init(model, path),
        .hidden = llama_model_n_embd(model),
        .weight = tensor(heads, "\"weight\""),
        .bias = tensor(heads, "\"bias\""),
        .spec = spec,
    };
    if (!g.context || !g.adapter || !g.weight) fail("does not fit the model", words[1]);
    if (!strncmp(behind(spec, "\"token_head\": "), "true", 4)) {
        const char * words_file = read_file(words[1], "token_head.safetensors");
        g.token_weight = tensor(words_file, "\"weight\"");
        if (!g.token_weight || sscanf(behind(words_file + 8, "\"shape\":["), "%d", &g.weighed_tokens) != 1) {
            fail("is no token head", words[1]);
        }
    }
    g.invocation = llama_adapter_get_alora_invocation_tokens(g.adapter);
    g.invoked = (int) llama_adapter_get_alora_n_invocation_tokens(g.adapter);
    if (!g.invoked) fail("has no activated adapter", words[1]);

    say(&g, "<|im_start|>system\n", 1);
    say(&g, count > 4 ? words[4] : SYSTEM, 0);
    say(&g, "<|im_end|>\n<|im_start|>user\n", 1);
    say(&g, words[3], 0);
    judge(&g, "prompt", of_words(&g, words[3]));
    say(&g, "<|im_end|>\n<|im_start|>assistant\n", 1);
    answer(&g);
    judge(&g, "response", 0);

    llama_free(g.context);
    llama_model_free(model);  // and the adapter with it
    return 0;
}
