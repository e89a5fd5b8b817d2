# Warnings and sanitizers of our own targets; consumers' flags are never touched.
function(cospadi_warnings target)
  # -Wrestrict: GCC 12 reports std::string concatenation (its bug 105329).
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Wno-psabi>
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
  if(COSPADI_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
  if(COSPADI_SANITIZE)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${COSPADI_SANITIZE} -fno-omit-frame-pointer -g>)
    if(COSPADI_FUZZ)
      target_compile_options(${target} PRIVATE -fno-sanitize-recover=all)
    endif()
    target_link_options(${target} PUBLIC -fsanitize=${COSPADI_SANITIZE})
  endif()
endfunction()
