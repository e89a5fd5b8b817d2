# The library for other C++ and C programs: target `cospadi`, and what `cmake --install` and the
# wheel carry: headers, library, package files.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Semantic versions: before 1.0 every minor version may break the interface.
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(COSPADI_ABI_VERSION "0.${PROJECT_VERSION_MINOR}")
  set(COSPADI_COMPATIBILITY SameMinorVersion)
else()
  set(COSPADI_ABI_VERSION "${PROJECT_VERSION_MAJOR}")
  set(COSPADI_COMPATIBILITY SameMajorVersion)
endif()

if(SKBUILD)
  # A wheel keeps links as copies: there the library has one name, the one that programs load.
  set(COSPADI_INSTALL_LIB lib)
  set(COSPADI_INSTALL_INCLUDE include)
  set(COSPADI_INSTALL_CMAKE cmake)
  set(COSPADI_LIBRARY_VERSION "${COSPADI_ABI_VERSION}")
  set(COSPADI_NAMELINK NAMELINK_SKIP)
else()
  set(COSPADI_INSTALL_LIB "${CMAKE_INSTALL_LIBDIR}")
  set(COSPADI_INSTALL_INCLUDE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(COSPADI_INSTALL_CMAKE "${CMAKE_INSTALL_LIBDIR}/cmake/cospadi")
  set(COSPADI_LIBRARY_VERSION "${PROJECT_VERSION}")
  set(COSPADI_NAMELINK "")
endif()

# Leaves visible what `map` lists. Marks in the sources hide our own symbols, but not the copies of
# the standard library's templates that every C++ object has.
function(cospadi_limit_symbols target map)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(${target} PRIVATE "LINKER:--version-script=${map}")
    set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS "${map}")
  endif()
endfunction()

function(cospadi_add_library)
  add_library(cospadi $<TARGET_OBJECTS:cospadi_objs>)
  add_library(cospadi::cospadi ALIAS cospadi)
  target_compile_features(cospadi PUBLIC cxx_std_20)
  target_include_directories(cospadi PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>
    $<INSTALL_INTERFACE:${COSPADI_INSTALL_INCLUDE}>)
  target_link_libraries(cospadi PRIVATE OpenMP::OpenMP_CXX)
  if(COSPADI_HAS_CUDA)
    target_link_libraries(cospadi PRIVATE CUDA::cudart_static)
  endif()
  if(COSPADI_SANITIZE)
    target_link_options(cospadi PUBLIC -fsanitize=${COSPADI_SANITIZE})
  endif()
  if(BUILD_SHARED_LIBS)
    set_target_properties(cospadi PROPERTIES
      VERSION "${COSPADI_LIBRARY_VERSION}" SOVERSION "${COSPADI_ABI_VERSION}")
    cospadi_limit_symbols(cospadi "${PROJECT_SOURCE_DIR}/csrc/cmake/cospadi.map")
    if(NOT COSPADI_SANITIZE) # a sanitizer's symbols come with the program
      # Missing symbols are ours to notice, not the first user's.
      target_link_options(cospadi PRIVATE $<$<PLATFORM_ID:Linux>:LINKER:--no-undefined>)
    endif()
  else()
    target_compile_definitions(cospadi PUBLIC COSPADI_STATIC)
  endif()
endfunction()

function(cospadi_install)
  install(TARGETS cospadi EXPORT cospadiTargets COMPONENT sdk
    RUNTIME DESTINATION "${COSPADI_INSTALL_LIB}"
    ARCHIVE DESTINATION "${COSPADI_INSTALL_LIB}"
    LIBRARY DESTINATION "${COSPADI_INSTALL_LIB}" COMPONENT sdk NAMELINK_COMPONENT sdk ${COSPADI_NAMELINK})
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/csrc/include/cospadi"
    DESTINATION "${COSPADI_INSTALL_INCLUDE}" COMPONENT sdk)
  install(EXPORT cospadiTargets NAMESPACE cospadi::
    DESTINATION "${COSPADI_INSTALL_CMAKE}" COMPONENT sdk)
  set(COSPADI_IS_STATIC ON)
  if(BUILD_SHARED_LIBS)
    set(COSPADI_IS_STATIC OFF)
  endif()
  configure_package_config_file(
    "${PROJECT_SOURCE_DIR}/csrc/cmake/cospadiConfig.cmake.in"
    "${PROJECT_BINARY_DIR}/cospadiConfig.cmake"
    INSTALL_DESTINATION "${COSPADI_INSTALL_CMAKE}")
  write_basic_package_version_file("${PROJECT_BINARY_DIR}/cospadiConfigVersion.cmake"
    VERSION "${PROJECT_VERSION}" COMPATIBILITY ${COSPADI_COMPATIBILITY})
  install(FILES
    "${PROJECT_BINARY_DIR}/cospadiConfig.cmake"
    "${PROJECT_BINARY_DIR}/cospadiConfigVersion.cmake"
    DESTINATION "${COSPADI_INSTALL_CMAKE}" COMPONENT sdk)
endfunction()
