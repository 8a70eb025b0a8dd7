package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// component is one thing that an image is made of.
type component struct {
	name, version string
	purl          string // package URL, which is how scanners look it up
	licence       string // SPDX expression; empty where it is not known
	sha256        string // of the file that it came in; empty where there is none
	parts         []component
}

// goProgram describes a program of this project by what its linker wrote into
// it, so what is listed is what is in it.
func goProgram(name string, content []byte, version string) (component, error) {
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return component{}, fmt.Errorf("%s: %w", name, err)
	}
	std := strings.TrimPrefix(strings.Fields(info.GoVersion)[0], "go")
	c := component{
		name: name, version: version, licence: "Apache-2.0",
		purl:   "pkg:golang/" + info.Main.Path + "@" + version + "#cmd/" + name,
		sha256: digest(content),
		parts:  []component{{name: "stdlib", version: std, purl: "pkg:golang/stdlib@" + std, licence: "BSD-3-Clause"}},
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		c.parts = append(c.parts, component{name: m.Path, version: m.Version, purl: "pkg:golang/" + m.Path + "@" + m.Version})
	}
	return c, nil
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// The parts of an SPDX 2.3 document that are used here.
type (
	spdxDocument struct {
		Version       string             `json:"spdxVersion"`
		License       string             `json:"dataLicense"`
		ID            string             `json:"SPDXID"`
		Name          string             `json:"name"`
		Namespace     string             `json:"documentNamespace"`
		Creation      spdxCreation       `json:"creationInfo"`
		Packages      []spdxPackage      `json:"packages"`
		Relationships []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		ID        string         `json:"SPDXID"`
		Name      string         `json:"name"`
		Version   string         `json:"versionInfo"`
		Location  string         `json:"downloadLocation"`
		Analyzed  bool           `json:"filesAnalyzed"`
		Declared  string         `json:"licenseDeclared"`
		Concluded string         `json:"licenseConcluded"`
		Copyright string         `json:"copyrightText"`
		Checksums []spdxChecksum `json:"checksums,omitempty"`
		Refs      []spdxRef      `json:"externalRefs,omitempty"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxRef struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		From string `json:"spdxElementId"`
		Type string `json:"relationshipType"`
		To   string `json:"relatedSpdxElement"`
	}
)

// sbom lists what is in an image as an SPDX document in JSON. The same
// components give the same bytes.
func sbom(name, version, arch string, components []component) ([]byte, error) {
	d := spdxDocument{
		Version: "SPDX-2.3", License: "CC0-1.0", ID: "SPDXRef-DOCUMENT", Name: name + "-" + version + "-linux-" + arch,
		Creation: spdxCreation{Created: epoch.Format(time.RFC3339), Creators: []string{"Tool: signet-images"}},
	}
	seen := map[string]string{} // purl -> id
	var add func(from, relation string, c component)
	add = func(from, relation string, c component) {
		id, ok := seen[c.purl]
		if !ok {
			id = fmt.Sprintf("SPDXRef-Package-%d", len(d.Packages))
			seen[c.purl] = id
			p := spdxPackage{ID: id, Name: c.name, Version: c.version, Location: "NOASSERTION", Declared: c.licence, Concluded: "NOASSERTION", Copyright: "NOASSERTION",
				Refs: []spdxRef{{Category: "PACKAGE-MANAGER", Type: "purl", Locator: c.purl}}}
			if p.Declared == "" {
				p.Declared = "NOASSERTION"
			}
			if c.sha256 != "" {
				p.Checksums = []spdxChecksum{{Algorithm: "SHA256", Value: c.sha256}}
			}
			d.Packages = append(d.Packages, p)
			for _, part := range c.parts {
				add(id, "DEPENDS_ON", part)
			}
		}
		r := spdxRelationship{From: from, Type: relation, To: id}
		if !slices.Contains(d.Relationships, r) {
			d.Relationships = append(d.Relationships, r)
		}
	}
	root := component{name: name, version: version, licence: "Apache-2.0", purl: "pkg:oci/" + name + "?arch=" + arch + "&tag=" + version}
	add(d.ID, "DESCRIBES", root)
	for _, c := range components {
		add(seen[root.purl], "CONTAINS", c)
	}
	// A document's namespace must be its own: it follows from what it says.
	unnamed, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	d.Namespace = "https://signet.dev/spdx/" + d.Name + "-" + digest(unnamed)
	out, err := json.MarshalIndent(d, "", " ")
	return append(out, '\n'), err
}
