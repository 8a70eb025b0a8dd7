package manifest

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// fingerprint describes the files below path without reading them: it changes
// when one is added, removed, replaced or written to.
func fingerprint(path string) string {
	files, err := yamlFiles(path)
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, file := range files {
		info, err := os.Stat(file)
		if err != nil {
			fmt.Fprintf(&b, "%q %v\n", file, err)
			continue
		}
		var inode uint64
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			inode = stat.Ino
		}
		fmt.Fprintf(&b, "%q %d %d %d %v\n", file, inode, info.Size(), info.ModTime().UnixNano(), info.Mode())
	}
	return b.String()
}
