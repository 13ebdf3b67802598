# SPDX-License-Identifier: Apache-2.0
# kvferry.spdx.json: kvferry's libraries and what this build of them was made with, in the versions that were found
# (SPDX 2.3, https://spdx.github.io/spdx-spec/v2.3). SOURCE_DATE_EPOCH, if set, is its date.

set(_packages "[]")
set(_relationships "[]")
set(_package_count 0)
set(_relationship_count 0)

# kvferry_sbom_package(<name> <version> <license>)
macro(kvferry_sbom_package name version license)
  set(_version "${version}")
  if(NOT _version)
    set(_version NOASSERTION)
  endif()
  string(
    JSON
    _packages
    SET
    "${_packages}"
    ${_package_count}
    "{\"SPDXID\": \"SPDXRef-${name}\", \"name\": \"${name}\", \"versionInfo\": \"${_version}\", \
\"downloadLocation\": \"NOASSERTION\", \"filesAnalyzed\": false, \"licenseConcluded\": \"NOASSERTION\", \
\"licenseDeclared\": \"${license}\", \"copyrightText\": \"NOASSERTION\"}")
  math(EXPR _package_count "${_package_count} + 1")
endmacro()

# kvferry_sbom_relation(<from> <relation> <to>)
macro(kvferry_sbom_relation from relation to)
  string(
    JSON
    _relationships
    SET
    "${_relationships}"
    ${_relationship_count}
    "{\"spdxElementId\": \"SPDXRef-${from}\", \"relationshipType\": \"${relation}\", \"relatedSpdxElement\": \"SPDXRef-${to}\"}")
  math(EXPR _relationship_count "${_relationship_count} + 1")
endmacro()

kvferry_sbom_package(kvferry "${PROJECT_VERSION}" "Apache-2.0")
kvferry_sbom_relation(DOCUMENT DESCRIBES kvferry)
# Headers alone: what is used of them is part of kvferry's own files.
kvferry_sbom_package(asio "${Asio_VERSION}" "BSL-1.0")
kvferry_sbom_package(msgpack-cxx "${MsgpackCxx_VERSION}" "BSL-1.0")
kvferry_sbom_package(cppzmq "${cppzmq_VERSION}" "MIT")
kvferry_sbom_package(xxhash "${XxHash_VERSION}" "BSD-2-Clause")
foreach(_name IN ITEMS asio msgpack-cxx cppzmq xxhash)
  kvferry_sbom_relation(kvferry STATIC_LINK ${_name})
endforeach()
# Its license depends on its version.
kvferry_sbom_package(libzmq "${ZeroMQ_VERSION}" "NOASSERTION")
kvferry_sbom_relation(kvferry DYNAMIC_LINK libzmq)
if(KVFERRY_HAS_TLS)
  kvferry_sbom_package(openssl "${OPENSSL_VERSION}" "Apache-2.0")
  kvferry_sbom_relation(kvferry DYNAMIC_LINK openssl)
endif()
if(KVFERRY_HAS_RDMA)
  kvferry_sbom_package(libibverbs "${Ibverbs_VERSION}" "GPL-2.0-only OR Linux-OpenIB")
  kvferry_sbom_relation(kvferry DYNAMIC_LINK libibverbs)
endif()

string(TIMESTAMP _created "%Y-%m-%dT%H:%M:%SZ" UTC)
# Two that differ in anything have other names.
string(
  UUID
  _identity
  NAMESPACE
  6ba7b811-9dad-11d1-80b4-00c04fd430c8
  NAME
  "${_created}${_packages}${_relationships}"
  TYPE
  SHA1)
set(_document "{\"spdxVersion\": \"SPDX-2.3\", \"dataLicense\": \"CC0-1.0\", \"SPDXID\": \"SPDXRef-DOCUMENT\"}")
string(JSON _document SET "${_document}" name "\"kvferry-${PROJECT_VERSION}\"")
string(JSON _document SET "${_document}" documentNamespace "\"urn:uuid:${_identity}\"")
string(JSON _document SET "${_document}" creationInfo
       "{\"created\": \"${_created}\", \"creators\": [\"Tool: CMake-${CMAKE_VERSION}\"]}")
string(JSON _document SET "${_document}" packages "${_packages}")
string(JSON _document SET "${_document}" relationships "${_relationships}")
file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/kvferry.spdx.json" CONTENT "@_document@\n" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/kvferry.spdx.json" DESTINATION "${CMAKE_INSTALL_DATADIR}/kvferry")
