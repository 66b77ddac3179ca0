"""What is done with each STAR label and .cs field that speaks of images, optics or sampling.

Labels are those of RELION 3.1 (``relion_refine --print_metadata_labels``), with those that 4 and 5 add
(src/metadata_label.h of both); fields are those of CryoSPARC's blob and ctf groups. What concerns jobs,
models and poses is not here.
"""

from __future__ import annotations

from enum import Enum


class Treatment(Enum):
    """What is done with a column.

    MODELLED:   read, and part of the model or of the reading of images.
    IRRELEVANT: says nothing that changes what an image of the set shows.
    IGNORED:    not modelled; named in a warning where it would matter.
    REFUSED:    an error where it says that images are no single 2-D projections under a CTF.
    """

    MODELLED = "modelled"
    IRRELEVANT = "irrelevant"
    IGNORED = "ignored"
    REFUSED = "refused"


def _all(treatment: Treatment, names: str) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), treatment)


LABELS: dict[str, Treatment] = {
    **_all(
        Treatment.MODELLED,
        """rlnImageName rlnOpticsGroup rlnOpticsGroupName rlnImagePixelSize rlnImageSize
        rlnImageDimensionality rlnVoltage rlnSphericalAberration rlnAmplitudeContrast rlnPhaseShift
        rlnDefocusU rlnDefocusV rlnDefocusAngle rlnMagnification rlnDetectorPixelSize rlnPixelSize
        rlnCtfBfactor rlnCtfScalefactor rlnCtfDataArePhaseFlipped rlnCtfDataAreCtfPremultiplied
        rlnMagMat00 rlnMagMat01 rlnMagMat10 rlnMagMat11""",
    ),
    **_all(
        Treatment.IRRELEVANT,
        """rlnBeamTiltClass rlnCtfAstigmatism rlnCtfFigureOfMerit rlnCtfImage rlnCtfMaxResolution
        rlnCtfPowerSpectrum rlnCtfValidationScore rlnCtfIceRingDensity rlnMicrographBinning
        rlnMicrographOriginalPixelSize rlnMicrographPixelSize rlnMicrographStartFrame
        rlnMicrographEndFrame rlnMicrographPreExposure rlnMicrographDoseRate rlnMicrographGainName
        rlnMicrographDefectFile rlnMicrographName rlnMicrographNameNoDW rlnMicrographMovieName
        rlnMicrographMetadata rlnMicrographTiltAngle rlnMicrographTiltAxisDirection
        rlnMicrographTiltAxisOutOfPlane rlnMtfFileName rlnMtfValue
        rlnSamplingRate rlnSamplingRateX rlnSamplingRateY rlnSamplingRateZ rlnNormCorrection
        rlnImageId rlnImageOriginalName rlnReconstructImageName rlnEnabled rlnDataType rlnEERGrouping
        rlnEERUpsampling rlnOpticsStarFile rlnTomoTiltSeriesPixelSize rlnTomoSubtomogramBinning
        rlnTomoTomogramBinning rlnTomoName rlnTomoParticleName rlnTomoParticleId rlnTomoHand
        rlnTomoDefocusSlope rlnMicrographNameEven rlnMicrographNameOdd rlnMicrographIceThickness
        rlnChromaticAberration rlnEnergyLoss rlnLensStability rlnConvergenceCone
        rlnTransversalDisplacement rlnLongitudinalDisplacement rlnImageWeight""",
    ),
    **_all(
        Treatment.IGNORED,
        """rlnBeamTiltX rlnBeamTiltY rlnOddZernike rlnEvenZernike rlnMagnificationCorrection
        rlnCtfBfactorPerElectronDose rlnIsFlip""",
    ),
    **_all(
        Treatment.REFUSED,
        """rlnTomoVisibleFrames rlnTomoSubTomosAre2DStacks rlnImageSizeX rlnImageSizeY rlnImageSizeZ
        rlnDataDimensionality rlnCtfDataAreCtfCorrected""",
    ),
}

FIELDS: dict[str, Treatment] = {
    **_all(
        Treatment.MODELLED,
        """blob/path blob/idx blob/shape blob/psize_A blob/sign ctf/exp_group_id ctf/accel_kv ctf/cs_mm
        ctf/amp_contrast ctf/df1_A ctf/df2_A ctf/df_angle_rad ctf/phase_shift_rad ctf/scale
        ctf/bfactor ctf/anisomag""",
    ),
    **_all(Treatment.IRRELEVANT, "blob/import_sig ctf/type ctf/scale_const ctf/shift_A"),
    **_all(Treatment.IGNORED, "ctf/tilt_A ctf/trefoil_A ctf/tetra_A"),
}
