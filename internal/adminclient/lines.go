package adminclient

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// lineReader reads lines of bounded length that each end in a line break.
type lineReader struct {
	r       *bufio.Reader
	longest int
}

func newLineReader(r io.Reader, longest int) *lineReader {
	return &lineReader{r: bufio.NewReader(r), longest: longest}
}

// next returns a line without its end, valid for the caller to keep; io.EOF
// after the last, io.ErrUnexpectedEOF when the last line is cut.
func (l *lineReader) next() ([]byte, error) {
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > l.longest {
			return nil, fmt.Errorf("a line is longer than %d bytes", l.longest)
		}
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err == io.EOF && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		}
		return nil, err
	}
}
