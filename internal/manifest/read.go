package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"
)

// Bounds on the input.
const (
	maxFileSize = 4 << 20 // bytes
	maxDepth    = 32      // levels of YAML nesting; the schema needs 7
	maxItems    = 10000   // of one list
)

// documents reads every document of the given files and directories. Reading
// goes on after a fault, so that one run reports all of them.
func documents(r *report, paths []string) []*document {
	var docs []*document
	seen := map[string]bool{}
	for _, path := range paths {
		files, err := yamlFiles(path)
		if err != nil {
			r.add(Finding{File: path, Code: CodeFile, Message: plainError(err)})
			continue
		}
		for _, file := range files {
			if clean := filepath.Clean(file); seen[clean] {
				continue
			} else {
				seen[clean] = true
			}
			data, err := readFile(file)
			if err != nil {
				r.add(Finding{File: file, Code: CodeFile, Message: plainError(err)})
				continue
			}
			docs = append(docs, parse(r, file, data)...)
		}
	}
	return docs
}

// yamlFiles returns the path itself, or the sorted YAML files of a directory.
func yamlFiles(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		if isYAMLName(e.Name()) {
			files = append(files, filepath.Join(path, e.Name()))
		}
	}
	if len(files) == 0 {
		return nil, errors.New("directory holds no *.yaml or *.yml file")
	}
	slices.Sort(files)
	return files, nil
}

// isYAMLName leaves out hidden files: editors keep swap and lock files there.
func isYAMLName(name string) bool {
	return !strings.HasPrefix(name, ".") && (strings.HasSuffix(name, ".yaml") || strings.HasSuffix(name, ".yml"))
}

func readFile(path string) ([]byte, error) {
	// O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("file is larger than %d MiB; split it", maxFileSize>>20)
	}
	return data, nil
}

// plainError drops the path that an *os.PathError repeats.
func plainError(err error) string {
	var pathError *os.PathError
	if errors.As(err, &pathError) {
		return pathError.Err.Error()
	}
	return err.Error()
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// parse splits a file into documents and decodes each. Empty documents are
// left out. After a syntax error the rest of the file cannot be read.
func parse(r *report, file string, data []byte) []*document {
	var docs []*document
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var root yaml.Node
		err := decoder.Decode(&root)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			line := 0
			message := err.Error()
			if m := yamlLine.FindStringSubmatch(message); m != nil {
				line, _ = strconv.Atoi(m[1])
				message = message[len(m[0]):]
			}
			r.add(Finding{File: file, Line: max(line, 1), Code: CodeSyntax, Message: "not valid YAML: " + message})
			return docs
		}
		if len(root.Content) == 0 || root.Content[0].ShortTag() == "!!null" && root.Content[0].Value == "" {
			continue
		}
		if d := decode(r, file, root.Content[0]); d != nil {
			docs = append(docs, d)
		}
	}
}

// forbidden finds YAML features that have no use here and that make a short
// file mean something long or something else than it shows.
func forbidden(n *yaml.Node, depth int) (line int, message string) {
	switch {
	case depth > maxDepth:
		return n.Line, fmt.Sprintf("nested deeper than %d levels", maxDepth)
	case n.Anchor != "": // every alias needs one before it
		return n.Line, "YAML anchors and aliases are refused; write values out where they are needed"
	case n.Style&yaml.TaggedStyle != 0:
		return n.Line, "YAML tags are refused; remove the word that starts with an exclamation mark"
	}
	for _, child := range n.Content {
		if line, message := forbidden(child, depth+1); message != "" {
			return line, message
		}
	}
	return 0, ""
}
