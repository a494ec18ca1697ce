// Errors of a kernel: text without an allocation, and exceptions that arrive in Python with the op's name.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>  // declares std::exception, at a tenth of what <exception> costs to read

#ifndef OPKIT_OP  // the generated glue names the op, so that every error does
#define OPKIT_OP "kernel"
#endif

// Out of the way of what runs.
#define OPKIT_COLD __attribute__((cold))
// Compiling what may fail, and what every tensor goes through, wherever it is used would take longer than a small kernel
// does: a function to call is a nanosecond. The bodies stand at the end of each header; OPKIT_LINKED leaves them out where
// the kernel is linked to glue.cpp, which has them.
#ifndef OPKIT_BODY
#define OPKIT_BODY __attribute__((noinline)) inline
#endif
// Stands in a loop over a few dimensions, which as vector code would take longest of all to compile.
#define OPKIT_SCALAR_LOOP __asm__ volatile("")

namespace opkit {

extern const char* const op_name;  // OPKIT_OP of the unit that glue.cpp is linked to

// Text of bounded length, built without allocating.
class Text {
 public:
  Text() { buffer_[0] = 0; }
  OPKIT_COLD Text& operator<<(const char* s);
  Text& operator<<(bool value) { return *this << (value ? "true" : "false"); }
  Text& operator<<(int value) { return *this << static_cast<long long>(value); }
  Text& operator<<(long value) { return *this << static_cast<long long>(value); }
  OPKIT_COLD Text& operator<<(long long value);
  Text& operator<<(unsigned value) { return digits(value); }
  Text& operator<<(unsigned long value) { return digits(value); }
  Text& operator<<(unsigned long long value) { return digits(value); }
  OPKIT_COLD Text& operator<<(double value);
  const char* c_str() const { return buffer_; }

  // Python reads UTF-8: a letter that is cut, or a byte of another encoding, would take the message with it.
  OPKIT_COLD void make_utf8();

 private:
  OPKIT_COLD Text& digits(unsigned long long value);
  char buffer_[1000];
  size_t length_ = 0;
};

// What OPKIT_CHECK throws; it arrives in Python as a RuntimeError with this text.
class Error : public std::exception {
 public:
  explicit Error(const Text& text);
  const char* what() const noexcept override;

 private:
  Text text_;
};

[[noreturn]] OPKIT_COLD void raise(const Text& text);

// A piece of an error's text, so that one function serves every call of `fail`.
struct Part {
  enum Kind { kText, kSigned, kUnsigned, kReal } kind;
  union {
    const char* text;
    long long number;
    unsigned long long natural;
    double real;
  };
  Part(const char* value) : kind(kText), text(value) {}
  Part(bool value) : kind(kText), text(value ? "true" : "false") {}
  Part(int value) : kind(kSigned), number(value) {}
  Part(long value) : kind(kSigned), number(value) {}
  Part(long long value) : kind(kSigned), number(value) {}
  Part(unsigned value) : kind(kUnsigned), natural(value) {}
  Part(unsigned long value) : kind(kUnsigned), natural(value) {}
  Part(unsigned long long value) : kind(kUnsigned), natural(value) {}
  Part(double value) : kind(kReal), real(value) {}
};

[[noreturn]] OPKIT_COLD void fail_with(const Part* parts, int count);

template <class... Parts>
[[noreturn]] __attribute__((always_inline)) inline void fail(const Parts&... parts) {
  const Part list[] = {Part(parts)...};
  fail_with(list, sizeof...(parts));
}

// OPKIT_CHECK(n % 8 == 0, "n is ", n, ", expected a multiple of 8");
#define OPKIT_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::opkit::fail(__VA_ARGS__); \
  } while (0)

// Inside a catch block: the exception that is handled as text with the op's name.
OPKIT_COLD Text handled();

#ifndef OPKIT_LINKED
OPKIT_BODY Text& Text::operator<<(const char* s) {
  while (*s && length_ < sizeof(buffer_) - 1) buffer_[length_++] = *s++;
  buffer_[length_] = 0;
  return *this;
}

OPKIT_BODY Text& Text::operator<<(long long value) {
  if (value < 0) *this << "-";
  return digits(value < 0 ? 0ULL - static_cast<unsigned long long>(value)
                          : static_cast<unsigned long long>(value));
}

OPKIT_BODY Text& Text::operator<<(double value) {
  char number[40];
  __builtin_snprintf(number, sizeof(number), "%g", value);
  return *this << number;
}

OPKIT_BODY Text& Text::digits(unsigned long long value) {
  char number[24];
  char* p = number + sizeof(number) - 1;
  *p = 0;
  do *--p = static_cast<char>('0' + value % 10);
  while (value /= 10);
  return *this << p;
}

OPKIT_BODY void Text::make_utf8() {
  for (size_t i = 0; i < length_;) {
    const unsigned char first = static_cast<unsigned char>(buffer_[i]);
    const size_t more = first < 0xc2 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
    const unsigned least[] = {0, 0x80, 0x800, 0x10000};
    unsigned letter = more ? first & (0x3fu >> more) : first;
    bool good = more ? first < 0xf5 && i + more < length_ : first < 0x80;
    for (size_t k = 1; good && k <= more; ++k) {
      const unsigned char next = static_cast<unsigned char>(buffer_[i + k]);
      good = next >> 6 == 2;
      letter = letter << 6 | (next & 0x3fu);
    }
    good = good && letter >= least[more] && letter < 0x110000 && letter >> 11 != 0x1b;
    if (!good) buffer_[i] = '?';
    i += good ? more + 1 : 1;
  }
}

OPKIT_BODY Error::Error(const Text& text) : text_(text) { text_.make_utf8(); }
OPKIT_BODY const char* Error::what() const noexcept { return text_.c_str(); }

OPKIT_BODY void raise(const Text& text) { throw Error(text); }

OPKIT_BODY void fail_with(const Part* parts, int count) {
  Text text;
  text << OPKIT_OP << ": ";
  for (int i = 0; i < count; ++i) {
    switch (parts[i].kind) {
      case Part::kText: text << parts[i].text; break;
      case Part::kSigned: text << parts[i].number; break;
      case Part::kUnsigned: text << parts[i].natural; break;
      case Part::kReal: text << parts[i].real; break;
    }
  }
  raise(text);
}

OPKIT_BODY Text handled() {
  Text text;
  try {
    throw;
  } catch (const Error& error) { text << error.what(); } catch (const std::exception& error) {
    text << OPKIT_OP << ": " << error.what();
  } catch (...) {
    text << OPKIT_OP
         << ": the kernel threw something that is no std::exception; throw one, or use "
            "OPKIT_CHECK";
  }
  return text;
}
#endif

}  // namespace opkit
