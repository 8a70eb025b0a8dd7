package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"
)

// Rotation, and why each line is read exactly once wherever a crash falls:
//
//  1. The spool is renamed to spool.N. Its inode number, which the stored
//     position names, stays.
//  2. Reopen is called until Path exists again: the proxy makes it after it
//     has closed the old file.
//  3. spool.N is read until nobody has it open for writing and all of it is
//     committed. Then Done is committed with the position.
//  4. spool.N is deleted, and Path is read from its start.
//
// Files are read in order (spool.N rising, then Path). So at any start, files
// before the one that the position names were finished, and those after it
// have not been begun.

// attach opens the file to go on with. It reports false when there is none.
func (t *Tailer) attach(ctx context.Context) (bool, error) {
	files, err := t.openFiles()
	if err != nil {
		return false, err
	}
	var keep *spoolFile
	defer func() {
		for _, f := range files {
			if f != keep {
				f.Close()
			}
		}
	}()
	pos := t.store.Position()
	use := func(f *spoolFile, p Position) {
		keep = f
		t.cur, t.pos, t.noLine, t.skip, t.quiet = f, p, 0, false, time.Now()
	}
	for i, f := range files {
		if f.inode != pos.File {
			continue
		}
		size, err := f.size()
		if err != nil {
			return false, err
		}
		m, err := pos.match(f.File, size)
		if err != nil {
			return false, err
		}
		if pos.Done && m == matchReplaced {
			continue // a new file with the number of the deleted one
		}
		if !f.retired {
			pos.Done = false // it was away, and is back
		}
		finished := files[:i]
		if pos.Done {
			finished = files[:i+1]
		}
		for _, f := range finished {
			if !f.retired {
				continue
			}
			if err := os.Remove(f.path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return false, err
			}
			t.log.Info("audit spool: deleted a file that has been read", slog.String("file", f.path))
		}
		if !pos.Done {
			use(f, pos)
			if m != matchSame {
				return true, t.resume(ctx, m, size)
			}
			return true, nil
		}
		files = files[i+1:] // the others have been dealt with
		for _, f := range finished {
			f.Close()
		}
		break
	}
	if len(files) == 0 {
		return false, t.lostFile(ctx, pos, nil)
	}
	use(files[0], Position{File: files[0].inode})
	return true, t.lostFile(ctx, pos, files[0])
}

// lostFile records, once, that the file of pos is gone although it was not
// read to its end.
func (t *Tailer) lostFile(ctx context.Context, pos Position, next *spoolFile) error {
	if pos.File == 0 || pos.Done {
		return nil
	}
	at := Position{Done: true, File: pos.File, Offset: pos.Offset, Head: pos.Head, Tail: pos.Tail}
	if next != nil {
		at = Position{File: next.inode}
	}
	gap := Gap{Reason: fmt.Sprintf("the spool file that was read up to byte %d is gone; what followed in it is not known", pos.Offset)}
	err := t.store.append(ctx, nil, []Gap{gap}, &at)
	if err == nil {
		t.log.Error("audit records may be missing", slog.String("reason", gap.Reason), slog.String("spool", t.o.Path))
	}
	if err != nil && next != nil {
		t.cur = nil // and so again
	}
	return err
}

// openFiles opens the spool's files in the order in which they are read.
func (t *Tailer) openFiles() (files []*spoolFile, err error) {
	numbers, err := retiredSpools(t.o.Path)
	if err != nil {
		return nil, err
	}
	for _, n := range numbers {
		f, err := openSpool(retiredPath(t.o.Path, n), true)
		if err != nil {
			return nil, errors.Join(err, closeAll(files))
		}
		files = append(files, f)
	}
	f, err := openSpool(t.o.Path, false)
	switch {
	case err == nil:
		files = append(files, f)
	case !errors.Is(err, os.ErrNotExist):
		return nil, errors.Join(err, closeAll(files))
	}
	return files, nil
}

func closeAll(files []*spoolFile) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// resume goes on in the current file after its content turned out not to be
// what the position says, and records that.
func (t *Tailer) resume(ctx context.Context, m match, size int64) error {
	var b lineBatch
	gap := func(format string, args ...any) {
		b.gaps = append(b.gaps, Gap{Reason: fmt.Sprintf("the spool file was "+format, args...)})
	}
	off := t.pos.Offset
	t.skip = false
	switch m {
	case matchReplaced:
		gap("emptied or replaced after byte %d; what was not read before is not known", off)
		off = 0
	case matchCut:
		// All that is left has been read.
		gap("cut from at least %d to %d bytes; what was not read before is not known", off, size)
		off = size
	case matchSpliced:
		// What is before off has, up to the cut, been read; where the cut
		// was cannot be told. Go on at the next whole line.
		gap("cut before byte %d and written again; what was written before that byte is not known", off)
		t.skip = true
	}
	if err := t.commit(ctx, b, off); err != nil {
		t.cur.Close()
		t.cur = nil
		return err
	}
	return nil
}

// rotate renames the spool and makes the proxy begin a new one.
func (t *Tailer) rotate(ctx context.Context) error {
	numbers, err := retiredSpools(t.o.Path)
	if err != nil {
		return err
	}
	n := uint64(1)
	if len(numbers) > 0 {
		n = numbers[len(numbers)-1] + 1
	}
	to := retiredPath(t.o.Path, n)
	if err := os.Rename(t.o.Path, to); err != nil {
		return err
	}
	t.cur.path, t.cur.retired, t.quiet, t.reopened = to, true, time.Now(), time.Time{}
	t.log.Info("audit spool rotated", slog.String("file", to))
	t.step("renamed")
	t.reopen(ctx)
	return nil
}

// reopen calls Reopen, at most once a second.
func (t *Tailer) reopen(ctx context.Context) {
	if t.o.Reopen == nil || time.Since(t.reopened) < time.Second {
		return
	}
	t.reopened = time.Now()
	if err := t.o.Reopen(ctx); err != nil && ctx.Err() == nil {
		t.log.Warn("audit spool: the proxy did not reopen its log; trying again", slog.Any("error", err))
		return
	}
	t.step("reopened")
}

// finish ends the reading of a retired file that has been read as far as it
// goes now; named is the inode number that Path has, 0 for none. It reports
// false while more may come.
func (t *Tailer) finish(ctx context.Context, named uint64) (bool, error) {
	var b lineBatch
	quiet := time.Since(t.quiet)
	if t.cur.path == "" && named == t.cur.inode {
		t.cur.path, t.cur.retired = t.o.Path, false // moved back
		return true, nil
	}
	switch w := t.cur.hasWriters(); {
	case w == writersNone:
	case named == 0:
		return false, nil // the proxy is being asked
	case w == writersUnknown && quiet >= t.o.Grace/10:
	case w == writersSome && quiet >= t.o.Grace:
		b.gaps = append(b.gaps, Gap{Reason: fmt.Sprintf("a rotated spool file was given up after %v although a process still has it open for writing", t.o.Grace)})
	default:
		return false, nil
	}
	size, err := t.cur.size()
	if err != nil {
		return false, err
	}
	if size != max(t.pos.Offset, t.noLine) {
		return true, nil // it grew before the look at its writers
	}
	if err := t.lastLine(&b, size); err != nil {
		return false, err
	}
	pos, err := positionAt(t.cur.File, t.cur.inode, size)
	if err != nil {
		return false, err
	}
	t.step("drained")
	pos.Done = true
	if err := t.commitAt(ctx, b, pos); err != nil {
		return false, err
	}
	t.step("done")
	if t.cur.path != "" {
		if err := os.Remove(t.cur.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	t.step("deleted")
	t.cur.Close()
	t.cur = nil
	return true, nil
}

// lastLine reads a last line that has no newline, from a file to which
// nothing will be added.
func (t *Tailer) lastLine(b *lineBatch, size int64) error {
	n := size - t.pos.Offset
	if n == 0 {
		return nil
	}
	if n > MaxLine {
		t.tooLong(b)
		return nil
	}
	line := make([]byte, n)
	if _, err := t.cur.ReadAt(line, t.pos.Offset); err != nil {
		return err
	}
	t.line(b, line)
	return nil
}
