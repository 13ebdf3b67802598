// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/detail/config.hpp>
#include <asio/version.hpp>

#include <kvferry/version.hpp>

#ifdef __cpp_rtti
#define KVFERRY_PROGRAM_RTTI 1
#else
#define KVFERRY_PROGRAM_RTTI 0
#endif

// Asio's objects differ with and without run-time type information, and a program shares them with kvferry. If the
// static library is of the other kind, the program compiles all of kvferry itself, and links nothing of the library.
#if !defined(KVFERRY_HEADER_ONLY) && KVFERRY_PROGRAM_RTTI != KVFERRY_RTTI && KVFERRY_IS_STATIC && \
    __has_include(<zmq.hpp>) && __has_include(<xxhash.h>) && (!KVFERRY_HAS_TLS || __has_include(<openssl/ssl.h>))
#define KVFERRY_HEADER_ONLY 1
#define KVFERRY_WITH_TLS KVFERRY_HAS_TLS
#endif

/// Whether the program's own files compile all of kvferry. `kvferry::tcp_header_only` sets it.
#ifndef KVFERRY_HEADER_ONLY
#define KVFERRY_HEADER_ONLY 0
#endif

/// Whether a program that compiles kvferry with its own files can encrypt TCP's data connections, by OpenSSL.
#ifndef KVFERRY_WITH_TLS
#define KVFERRY_WITH_TLS 0
#endif

#if KVFERRY_HEADER_ONLY
#define KVFERRY_INLINE inline
#else
/// Marks the definitions in `*-inl.hpp`. The files in `src/` compile them once.
#define KVFERRY_INLINE
#endif

/// Marks the symbols that a shared library offers. All others are hidden in it, and can't clash with the program's.
#define KVFERRY_EXPORT __attribute__((visibility("default")))

#if !KVFERRY_HEADER_ONLY
#if KVFERRY_PROGRAM_RTTI && !KVFERRY_RTTI
#error "this kvferry was built without RTTI: build what includes it with -fno-rtti, or kvferry with -DKVFERRY_RTTI=ON, or take kvferry::tcp_header_only"
#elif !KVFERRY_PROGRAM_RTTI && KVFERRY_RTTI
#error "this kvferry was built with RTTI: build what includes it with -frtti, or kvferry with -DKVFERRY_RTTI=OFF, or take kvferry::tcp_header_only"
#endif
// Asio's objects differ from version to version, too.
#if ASIO_VERSION != KVFERRY_ASIO_VERSION
#error "this kvferry was built with another version of Asio: see KVFERRY_ASIO_VERSION in kvferry/version.hpp"
#endif
#endif

// The inline namespace that all of kvferry stands in. Its name has the version, the mode, and each macro that changes the
// layout of an object. A program and a library that differ in one of them don't link.
#if KVFERRY_HEADER_ONLY && KVFERRY_WITH_TLS
#define KVFERRY_ABI_MODE _header_only
#elif KVFERRY_HEADER_ONLY
#define KVFERRY_ABI_MODE _header_only_no_tls
#else
#define KVFERRY_ABI_MODE
#endif
#if KVFERRY_PROGRAM_RTTI
#define KVFERRY_ABI_RTTI
#else
#define KVFERRY_ABI_RTTI _no_rtti
#endif
#ifdef ASIO_NO_TYPEID
#define KVFERRY_ABI_TYPEID _no_typeid
#else
#define KVFERRY_ABI_TYPEID
#endif
#ifdef ASIO_ENABLE_HANDLER_TRACKING
#define KVFERRY_ABI_TRACKING _tracking
#else
#define KVFERRY_ABI_TRACKING
#endif
#ifdef ASIO_DISABLE_THREADS
#define KVFERRY_ABI_THREADS _no_threads
#else
#define KVFERRY_ABI_THREADS
#endif
#ifdef _GLIBCXX_DEBUG
#define KVFERRY_ABI_DEBUG _debug
#else
#define KVFERRY_ABI_DEBUG
#endif
#define KVFERRY_ABI_JOIN(a, b, c, d, e, f, g) a##b##c##d##e##f##g
#define KVFERRY_ABI_NAME(a, b, c, d, e, f, g) KVFERRY_ABI_JOIN(a, b, c, d, e, f, g)
#define KVFERRY_ABI                                                                                            \
  KVFERRY_ABI_NAME(KVFERRY_ABI_VERSION, KVFERRY_ABI_MODE, KVFERRY_ABI_RTTI, KVFERRY_ABI_TYPEID, KVFERRY_ABI_TRACKING, \
                   KVFERRY_ABI_THREADS, KVFERRY_ABI_DEBUG)
