// The process that measures llama.cpp: token numbers in, seconds out. It links libllama.
//
//     llama_driver PIPE MODEL IDS CORE,CORE.. COMMAND..
//
// PIPE is an inherited file descriptor, to which lines of JSON tell each phase; IDS a file of int32
// token numbers, from which prompts and decoded tokens are taken, because greedy tokens of random
// weights repeat themselves and with them the experts. A thread runs on each core. Commands:
//
//     prefill:TOKENS                        a prompt, until its last logits are there
//     decode:CONTEXT:BATCH:TOKENS:STATE     tokens after a context; STATE is a file that keeps the
//                                           context of one sequence, and is made if it is absent
//     generate:PROMPT:TOKENS                a prompt and greedy tokens, and all of it once more
//     logits:TOKENS:FILE                    the last logits of a prompt, as float32
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr int kBatch = 2048;    // of a prompt, handed over at once, as llama.cpp's own programs do
constexpr int kRounding = 256;  // llama.cpp rounds a sequence's context up to it

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "llama_driver: %s\n", message.c_str());
  std::exit(1);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto of = [](const timeval& time) { return time.tv_sec + 1e-6 * time.tv_usec; };
  return of(usage.ru_utime) + of(usage.ru_stime);
}

// Bytes of a line of /proc/self/status, which counts KiB.
int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind(key + ":", 0) == 0) return std::stoll(line.substr(key.size() + 1)) * 1024;
  return 0;
}

// Tells what a phase took, in the form of benchmarks/full_size_child.py.
class Phase {
 public:
  Phase(FILE* pipe, std::string name)
      : pipe_(pipe), name_(std::move(name)), started_(now()), cpu_(cpu_seconds()) {
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins anew
  }

  // With the seconds that it took, and those of a prompt or of each token.
  void end(const std::vector<double>& tokens = {}) {
    const double seconds = now() - started_, cpu = cpu_seconds() - cpu_;
    std::ostringstream line;
    line.precision(9);
    line << "{\"phase\": \"" << name_ << "\", \"seconds\": " << seconds
         << ", \"cpu_seconds\": " << cpu << ", \"graphs\": 0, \"token_seconds\": [";
    for (size_t i = 0; i < tokens.size(); i++) line << (i ? ", " : "") << tokens[i];
    const int64_t resident = status("VmRSS"), anonymous = status("RssAnon");
    line << "], \"memory\": {\"anonymous\": " << anonymous
         << ", \"mapped\": " << resident - anonymous << ", \"resident\": " << resident
         << ", \"peak\": " << status("VmHWM") << "}}\n";
    std::fputs(line.str().c_str(), pipe_);
    std::fflush(pipe_);
  }

 private:
  FILE* pipe_;
  std::string name_;
  double started_, cpu_;
};

class Context {
 public:
  Context(llama_model* model, int threads, int length, int sequences) : model_(model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = sequences * ((length + kRounding - 1) / kRounding * kRounding);
    params.n_batch = kBatch;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    params.kv_unified = false;  // each sequence has keys and values of its own
    context_ = llama_init_from_model(model, params);
    if (!context_) fail("no context");
  }
  ~Context() { llama_free(context_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // A prompt of sequence 0, from its begin; the logits of its last token.
  const float* prompt(const std::vector<llama_token>& ids) {
    llama_memory_clear(llama_get_memory(context_), true);
    for (size_t begin = 0; begin < ids.size(); begin += kBatch) {
      const size_t end = std::min(begin + kBatch, ids.size());
      llama_batch batch = llama_batch_init(end - begin, 0, 1);
      for (size_t i = begin; i < end; i++) add(batch, ids[i], i, 0, i + 1 == ids.size());
      run(batch);
    }
    return last_logits();
  }

  // A token of each sequence, at the same position.
  const float* step(const std::vector<llama_token>& tokens, int position) {
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) add(batch, tokens[i], position, i, true);
    run(batch);
    return last_logits();
  }

  // The context of sequence 0 from a file, or computed and kept there; then that of all sequences.
  void fill(const std::vector<llama_token>& ids, const std::string& state, int sequences) {
    size_t count = 0;
    std::vector<llama_token> kept(ids.size());
    if (access(state.c_str(), R_OK) != 0) {
      prompt(ids);
      if (!llama_state_seq_save_file(context_, state.c_str(), 0, ids.data(), ids.size()))
        fail("the context cannot be kept");
    } else if (!llama_state_seq_load_file(context_, state.c_str(), 0, kept.data(), kept.size(),
                                          &count) ||
               kept != ids) {
      fail("the file has another context");
    }
    for (int i = 1; i < sequences; i++)
      llama_memory_seq_cp(llama_get_memory(context_), 0, i, -1, -1);
  }

  llama_token best(const float* logits) const {
    return std::max_element(logits, logits + vocab()) - logits;
  }
  int vocab() const { return llama_vocab_n_tokens(llama_model_get_vocab(model_)); }

 private:
  static void add(llama_batch& batch, llama_token token, int position, int sequence, bool logits) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = logits;
  }

  void run(llama_batch batch) {
    if (llama_decode(context_, batch) != 0) fail("llama_decode failed");
    llama_batch_free(batch);
  }

  const float* last_logits() {
    llama_synchronize(context_);
    return llama_get_logits_ith(context_, -1);
  }

  llama_model* model_;
  llama_context* context_;
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

struct Driver {
  FILE* pipe;
  llama_model* model;
  std::vector<llama_token> ids;
  int threads;

  std::vector<llama_token> first(int count) const {
    if (count > static_cast<int>(ids.size())) fail("too few token numbers");
    return {ids.begin(), ids.begin() + count};
  }

  void prefill(int tokens) {
    Context context(model, threads, tokens, 1);
    Phase phase(pipe, "prefill " + std::to_string(tokens));
    const double started = now();
    context.prompt(first(tokens));
    phase.end({now() - started});
  }

  void decode(int length, int sequences, int tokens, const std::string& state) {
    Context context(model, threads, length + tokens + 1, sequences);
    context.fill(first(length), state, sequences);
    std::ostringstream name;
    name << "decode " << length << " " << sequences << " " << tokens;
    Phase phase(pipe, name.str());
    std::vector<double> seconds;
    size_t next = 0;
    for (int i = 0; i <= tokens; i++) {
      std::vector<llama_token> row;
      while (static_cast<int>(row.size()) < sequences) row.push_back(ids[next++ % ids.size()]);
      const double started = now();
      context.step(row, length + i);
      if (i > 0) seconds.push_back(now() - started);  // the first one prepares
    }
    phase.end(seconds);
  }

  void generate(int prompt, int tokens) {
    Context context(model, threads, prompt + tokens, 1);
    for (const bool again : {false, true}) {
      Phase whole(pipe, "again"), begin(pipe, "first token");
      llama_token token = context.best(context.prompt(first(prompt)));
      if (!again) begin.end();
      Phase rest(pipe, "further tokens");
      for (int i = 0; i < tokens; i++) token = context.best(context.step({token}, prompt + i));
      (again ? whole : rest).end();
    }
  }

  void logits(int tokens, const std::string& file) {
    Context context(model, threads, tokens, 1);
    const float* values = context.prompt(first(tokens));
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(values), sizeof(float) * context.vocab());
  }

  void command(const std::string& text) {
    const std::vector<std::string> parts = split(text, ':');
    const auto number = [&](size_t i) { return std::stoi(parts.at(i)); };
    if (parts[0] == "prefill")
      prefill(number(1));
    else if (parts[0] == "decode")
      decode(number(1), number(2), number(3), parts.at(4));
    else if (parts[0] == "generate")
      generate(number(1), number(2));
    else if (parts[0] == "logits")
      logits(number(1), parts.at(2));
    else
      fail("no command " + text);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) fail("llama_driver PIPE MODEL IDS CORES COMMAND..");
  FILE* pipe = fdopen(std::stoi(argv[1]), "w");
  Phase import(pipe, "import");
  cpu_set_t set;
  CPU_ZERO(&set);
  const std::vector<std::string> cores = split(argv[4], ',');
  for (const std::string& core : cores) CPU_SET(std::stoi(core), &set);
  sched_setaffinity(0, sizeof(set), &set);
  std::ifstream file(argv[3], std::ios::binary);
  std::vector<llama_token> ids;
  for (llama_token id; file.read(reinterpret_cast<char*>(&id), sizeof(id));) ids.push_back(id);
  llama_backend_init();
  import.end();

  Phase load(pipe, "load");
  llama_model* model = llama_model_load_from_file(argv[2], llama_model_default_params());
  if (!model) fail("the model cannot be loaded");
  load.end();

  Driver driver{pipe, model, ids, static_cast<int>(cores.size())};
  for (int i = 5; i < argc; i++) driver.command(argv[i]);
  llama_model_free(model);
  return 0;
}
